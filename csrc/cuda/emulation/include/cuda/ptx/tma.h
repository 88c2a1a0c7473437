// Emulation of ptx/tma.h: a box copy in 128-byte swizzle.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/common/bf16.h"
#include "cuda/ptx/launch.h"
#include "cuda/ptx/mbarrier.h"

namespace moetrain::ptx {

struct TensorMap {
    const Bf16* data = nullptr;
    int64_t num_slices = 0;
    int64_t num_rows = 0;
    int64_t num_columns = 0;
    int box_rows = 0;
    int box_columns = 0;
};

inline TensorMap make_tensor_map(const Bf16* data, int64_t num_slices, int64_t num_rows, int64_t num_columns,
                                 int box_rows, int box_columns) {
    if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || num_columns * sizeof(Bf16) % 16 != 0)
        throw std::invalid_argument("make_tensor_map: address and row must be multiples of 16 bytes");
    if (num_slices < 1 || num_rows < 1 || num_columns < 1)
        throw std::invalid_argument("make_tensor_map: every size must be at least 1");
    if (box_rows < 1 || box_rows > 256 || box_columns < 8 || box_columns > 64 || box_columns % 8 != 0)
        throw std::invalid_argument("make_tensor_map: a box has at most 256 rows of at most 128 bytes, in 16s; got [" +
                                    std::to_string(box_rows) + ", " + std::to_string(box_columns) + "]");
    return {data, num_slices, num_rows, num_columns, box_rows, box_columns};
}

inline void prefetch_tensor_map(const TensorMap*) {}

inline void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, int slice, int row, int column) {
    constexpr int kChunkSize = 16;
    emulation::EmulatedBlock& block = emulation::current_block();
    const uint32_t box_address = block.shared_address(shared);
    if (box_address % 128 != 0) block.fail("TMA needs a shared address that is a multiple of 128");
    if (map->data == nullptr) block.fail("TMA with a tensor map that was not encoded");
    for (const uint64_t* unfenced : block.unfenced_mbarriers)
        if (unfenced == barrier) block.fail("TMA signals an mbarrier that fence_mbarrier_init has not published");
    block.check_global(map->data,
                       static_cast<size_t>(map->num_slices * map->num_rows * map->num_columns) * sizeof(Bf16),
                       "a tensor map");
    const int chunks_per_row = map->box_columns * static_cast<int>(sizeof(Bf16)) / kChunkSize;

    // The hardware exchanges bits 4-6 of the shared address with themselves XOR bits 7-9.
    const auto chunk_pointer = [&block, box_address](int box_row, int chunk_idx) {
        const uint32_t address = box_address + static_cast<uint32_t>(box_row * 128 + chunk_idx * kChunkSize);
        return block.shared_pointer(address ^ ((address >> 7 & 7) << 4), kChunkSize);
    };
    for (int box_row = 0; box_row < map->box_rows; ++box_row)
        for (int i = 0; i < chunks_per_row; ++i)
            block.begin_copy(chunk_pointer(box_row, i));

    block.submit(
        [&block, map, barrier, slice, row, column, chunks_per_row, chunk_pointer] {
            for (int box_row = 0; box_row < map->box_rows; ++box_row) {
                const bool is_row_inside =
                    slice >= 0 && slice < map->num_slices && row + box_row >= 0 && row + box_row < map->num_rows;
                const Bf16* source =
                    is_row_inside ? map->data + (slice * map->num_rows + row + box_row) * map->num_columns : nullptr;
                for (int i = 0; i < chunks_per_row; ++i) {
                    uint8_t* target = chunk_pointer(box_row, i);
                    const int64_t first = column + 8 * i;
                    if (is_row_inside && first >= 0 && first < map->num_columns)
                        std::memcpy(target, source + first, kChunkSize);  // rows are multiples of a chunk
                    else
                        std::memset(target, 0, kChunkSize);
                    block.end_copy_async_proxy(target);
                }
            }
            emulation::complete_bytes(barrier, static_cast<int64_t>(map->box_rows) * chunks_per_row * kChunkSize);
        },
        "TMA of box (" + std::to_string(slice) + ", " + std::to_string(row) + ", " + std::to_string(column) + ")");
}

}  // namespace moetrain::ptx
