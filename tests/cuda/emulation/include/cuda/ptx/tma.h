// Emulation of ptx/tma.h: copies of boxes, chunk by chunk, with their swizzle.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "cuda/common/tensor_spec.h"
#include "cuda/ptx/launch.h"
#include "cuda/ptx/mbarrier.h"

namespace moetrain::ptx {

struct TensorMap {
    TensorSpec spec;
    bool is_encoded = false;
};

inline TensorMap make_tensor_map(const TensorSpec& spec) { return {checked(spec), true}; }

}  // namespace moetrain::ptx

namespace moetrain::emulation {

constexpr int kElementsPerChunk = 8;

// 16 bytes of a box: where they lie in shared memory, and which elements of the tensor they hold.
struct BoxChunk {
    uint32_t address;
    Bf16* elements;  // of the first; null where the row is outside
    int begin, end;  // the elements of the chunk that are inside the tensor
};

// The hardware exchanges address bits from 4 on with themselves XOR bits from 7 on: 1, 2 or 3 bits.
inline uint32_t swizzled(uint32_t address, Swizzle swizzle) {
    const uint32_t bits = (1U << static_cast<int>(swizzle)) - 1;
    return address ^ ((address >> 7 & bits) << 4);
}

inline std::vector<BoxChunk> chunks_of_box(const ptx::TensorMap& map, const void* shared, int slice, int row,
                                           int column) {
    EmulatedBlock& block = current_block();
    const TensorSpec& spec = map.spec;
    const uint32_t box_address = block.shared_address(shared);
    if (!map.is_encoded) block.fail("TMA with a tensor map that was not encoded");
    if (box_address % 128 != 0) block.fail("TMA needs a shared address that is a multiple of 128");
    std::vector<BoxChunk> chunks;
    for (int box_row = 0; box_row < spec.box_rows; ++box_row) {
        const bool is_inside =
            slice >= 0 && slice < spec.num_slices && row + box_row >= 0 && row + box_row < spec.num_rows;
        const int64_t offset = slice * spec.slice_stride + (row + box_row) * spec.row_stride;
        for (int first = 0; first < spec.box_columns; first += kElementsPerChunk) {
            const auto within = [&](int64_t x) { return static_cast<int>(std::clamp<int64_t>(x, 0, 8)); };
            const int begin = within(-int64_t{column} - first);
            const int end = within(spec.num_columns - column - first);
            const auto address = box_address + static_cast<uint32_t>(2 * (box_row * spec.box_columns + first));
            chunks.push_back(
                {swizzled(address, spec.swizzle),
                 is_inside && begin < end ? const_cast<Bf16*>(spec.data) + offset + column + first : nullptr, begin,
                 end});
        }
    }
    for (const BoxChunk& chunk : chunks)
        if (chunk.elements != nullptr)
            block.check_global(chunk.elements + chunk.begin, 2 * static_cast<size_t>(chunk.end - chunk.begin), "TMA");
    return chunks;
}

inline void check_published(const uint64_t* barrier) {
    const auto& unfenced = current_block().unfenced_mbarriers;
    if (std::find(unfenced.begin(), unfenced.end(), barrier) != unfenced.end())
        current_block().fail("TMA signals an mbarrier that fence_mbarrier_init has not published");
}

inline void check_bulk(const void* shared, const void* global, int num_bytes) {
    EmulatedBlock& block = current_block();
    if (num_bytes <= 0 || (block.shared_address(shared) | reinterpret_cast<uintptr_t>(global) | num_bytes) % 16 != 0)
        block.fail("bulk copies need addresses and a size that are multiples of 16");
    block.check_global(global, static_cast<size_t>(num_bytes), "bulk copy");
}

inline void read_early_or_later(PendingStore& store) {
    EmulatedBlock& block = current_block();
    if (store.is_read || !block.happens_early()) return;
    store.read();
    store.is_read = true;
    if (!block.happens_early()) return;
    store.write();
    store.is_written = true;
}

// A store of `chunks` of 16 bytes; put(content of all chunks) writes them to global memory.
template <class Put>
void submit_store(std::vector<uint32_t> addresses, Put put) {
    EmulatedBlock& block = current_block();
    EmulatedThread& thread = block.thread();
    for (const uint32_t address : addresses)
        block.shared().begin_async_read(address, thread.thread_idx);
    auto content = std::make_shared<std::vector<std::array<uint8_t, 16>>>(addresses.size());
    PendingStore store;
    store.group_idx = thread.num_store_groups;
    store.read = [&block, addresses, content] {
        for (size_t i = 0; i < addresses.size(); ++i) {
            std::memcpy((*content)[i].data(), block.shared().pointer(addresses[i], 16), 16);
            block.shared().end_async_read(addresses[i]);
        }
    };
    store.write = [content, put] { put(*content); };
    read_early_or_later(store);
    thread.pending_stores.push_back(std::move(store));
}

inline void retire_stores(int num_pending_groups, bool only_reads) {
    EmulatedBlock& block = current_block();
    EmulatedThread& thread = block.thread();
    for (PendingStore& store : thread.pending_stores) {
        if (store.group_idx >= thread.num_store_groups - num_pending_groups) continue;
        if (!store.is_read) store.read();
        store.is_read = true;
        if (only_reads || store.is_written) continue;
        store.write();
        store.is_written = true;
    }
    std::erase_if(thread.pending_stores, [](const PendingStore& store) { return store.is_written; });
    block.yield_sometimes();
}

}  // namespace moetrain::emulation

namespace moetrain::ptx {

inline void prefetch_tensor_map(const TensorMap*) {}

inline void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, int slice, int row, int column) {
    emulation::EmulatedBlock& block = emulation::current_block();
    emulation::check_published(barrier);
    const auto chunks = emulation::chunks_of_box(*map, shared, slice, row, column);
    for (const emulation::BoxChunk& chunk : chunks)
        block.shared().begin_copy(block.shared().pointer(chunk.address, 16));
    block.submit(
        [&block, barrier, chunks] {
            for (const emulation::BoxChunk& chunk : chunks) {
                uint8_t* target = block.shared().pointer(chunk.address, 16);
                std::memset(target, 0, 16);
                if (chunk.elements != nullptr)
                    std::memcpy(target + 2 * chunk.begin, chunk.elements + chunk.begin, 2 * (chunk.end - chunk.begin));
                block.shared().end_copy_async_proxy(target);
            }
            emulation::complete_bytes(barrier, 16 * static_cast<int64_t>(chunks.size()));
        },
        "TMA load of box (" + std::to_string(slice) + ", " + std::to_string(row) + ", " + std::to_string(column) + ")");
}

inline void bulk_load(void* shared, const void* global, int num_bytes, uint64_t* barrier) {
    emulation::EmulatedBlock& block = emulation::current_block();
    emulation::check_published(barrier);
    emulation::check_bulk(shared, global, num_bytes);
    auto* target = static_cast<uint8_t*>(shared);
    for (int i = 0; i < num_bytes; i += 16)
        block.shared().begin_copy(target + i);
    block.submit(
        [&block, target, global, num_bytes, barrier] {
            std::memcpy(target, global, static_cast<size_t>(num_bytes));
            for (int i = 0; i < num_bytes; i += 16)
                block.shared().end_copy_async_proxy(target + i);
            emulation::complete_bytes(barrier, num_bytes);
        },
        "bulk load of " + std::to_string(num_bytes) + " bytes");
}

inline void tma_store(const TensorMap* map, const void* shared, int slice, int row, int column) {
    const auto chunks = emulation::chunks_of_box(*map, shared, slice, row, column);
    std::vector<uint32_t> addresses;
    for (const emulation::BoxChunk& chunk : chunks)
        addresses.push_back(chunk.address);
    emulation::submit_store(addresses, [chunks](const std::vector<std::array<uint8_t, 16>>& content) {
        for (size_t i = 0; i < chunks.size(); ++i)
            if (chunks[i].elements != nullptr)
                std::memcpy(chunks[i].elements + chunks[i].begin, content[i].data() + 2 * chunks[i].begin,
                            2 * static_cast<size_t>(chunks[i].end - chunks[i].begin));
    });
}

inline void bulk_store(void* global, const void* shared, int num_bytes) {
    emulation::check_bulk(shared, global, num_bytes);
    const uint32_t first = emulation::current_block().shared_address(shared);
    std::vector<uint32_t> addresses;
    for (int i = 0; i < num_bytes; i += 16)
        addresses.push_back(first + static_cast<uint32_t>(i));
    emulation::submit_store(addresses, [global](const std::vector<std::array<uint8_t, 16>>& content) {
        std::memcpy(global, content.data(), 16 * content.size());
    });
}

inline void bulk_commit() { emulation::current_block().thread().num_store_groups += 1; }

template <int kNumPending>
void bulk_wait_read() {
    emulation::retire_stores(kNumPending, /*only_reads=*/true);
}

template <int kNumPending>
void bulk_wait() {
    emulation::retire_stores(kNumPending, /*only_reads=*/false);
}

}  // namespace moetrain::ptx
