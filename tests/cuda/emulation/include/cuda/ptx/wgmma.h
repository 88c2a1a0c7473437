// Emulation of ptx/wgmma.h. Each thread computes its own fragment of the product, straight from shared memory through
// the descriptors. While wgmma are in flight the thread's accumulators hold NaN.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "cuda/ptx/launch.h"

namespace moetrain::emulation {

constexpr uint32_t kAccumulatorPoison = 0xFFFFFFFF;

// The matrix descriptor, decoded. Swizzled layouts alone.
struct OperandTile {
    uint32_t start;
    uint32_t leading_bytes;
    uint32_t stride_bytes;
    uint32_t row_bytes;     // 32, 64 or 128
    uint32_t swizzle_bits;  // 1, 2 or 3 bits from 4 on are XORed with those from 7 on
};

inline OperandTile decode_descriptor(uint64_t descriptor) {
    EmulatedBlock& block = current_block();
    const auto field = [descriptor](int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3FFF) << 4; };
    const auto base_offset = static_cast<uint32_t>(descriptor >> 49 & 7);
    const auto mode = static_cast<uint32_t>(descriptor >> 62);
    if (mode == 0)
        block.fail("descriptor " + hex(descriptor) +
                   " has swizzle mode 0; the emulation knows 1 to 3 (128, 64, 32 bytes)");
    const uint32_t num_bits = 4 - mode;
    const uint32_t pattern_bytes = 128 << num_bits;
    if (base_offset != 0 || field(0) / 128 * 128 % pattern_bytes != 0)
        block.fail("descriptor " + hex(descriptor) + ": the tile must start on a " + std::to_string(pattern_bytes) +
                   "-byte boundary, base offset 0");
    return {field(0), field(16), field(32), 16U << num_bits, (1U << num_bits) - 1};
}

// `kNumValues` bf16 from `address` on, inside one chunk of 16 bytes.
template <int kNumValues>
void read_bf16(const OperandTile& tile, uint32_t address, const EmulatedThread& reader, float* values) {
    const uint32_t place = address ^ ((address >> 7 & tile.swizzle_bits) << 4);
    const uint8_t* chunk = current_block().shared().read_async_proxy(place / 16 * 16, reader.thread_idx, "wgmma");
    uint16_t bits[kNumValues];
    std::memcpy(bits, chunk + place % 16, sizeof(bits));
    for (int i = 0; i < kNumValues; ++i)
        values[i] = std::bit_cast<float>(uint32_t{bits[i]} << 16);
}

// The sixteen K values of row (of A) or column (of B) `mn`. PTX ISA, "Strides": in a K-major tile, the stride goes from
// 8 rows to the next 8; in an MN-major one, the leading offset goes from one row's elements along M or N to the next,
// the stride from 8 along K to the next 8.
inline void read_operand(const OperandTile& tile, Major major, int mn, const EmulatedThread& reader,
                         float (&values)[16]) {
    const auto idx = static_cast<uint32_t>(mn);
    if (major == Major::kK) {
        const uint32_t row = tile.start + idx / 8 * tile.stride_bytes + idx % 8 * tile.row_bytes;
        for (uint32_t chunk_idx = 0; chunk_idx < 2; ++chunk_idx)
            read_bf16<8>(tile, row + 16 * chunk_idx, reader, values + 8 * chunk_idx);
        return;
    }
    const uint32_t elements_per_row = tile.row_bytes / 2;
    const uint32_t column = tile.start + idx / elements_per_row * tile.leading_bytes + idx % elements_per_row * 2;
    for (uint32_t k = 0; k < 16; ++k)
        read_bf16<1>(tile, column + k / 8 * tile.stride_bytes + k % 8 * tile.row_bytes, reader, values + k);
}

inline AccumulatorsInFlight& find_accumulators(EmulatedThread& thread, const float* accumulators) {
    return *std::find_if(thread.accumulators_in_flight.begin(), thread.accumulators_in_flight.end(),
                         [&](const AccumulatorsInFlight& entry) { return entry.accumulators == accumulators; });
}

// PTX ISA, "Register fragments", accumulator D of m64nNk16.
inline void execute_wgmma(EmulatedThread& thread, PendingWgmma& work) {
    const int lane_idx = thread.thread_idx % 32;
    const int warp_idx = thread.thread_idx / 32 % 4;
    std::vector<float>& accumulators = find_accumulators(thread, work.accumulators).values;
    const OperandTile a_tile = decode_descriptor(work.a_descriptor);
    const OperandTile b_tile = decode_descriptor(work.b_descriptor);
    float a_rows[2][16];
    for (int half = 0; half < 2; ++half)
        read_operand(a_tile, work.major_a, 16 * warp_idx + lane_idx / 4 + 8 * half, thread, a_rows[half]);
    for (int octet = 0; octet < work.tile_n / 8; ++octet) {
        for (int parity = 0; parity < 2; ++parity) {
            float b_row[16];
            read_operand(b_tile, work.major_b, 8 * octet + 2 * (lane_idx % 4) + parity, thread, b_row);
            for (int half = 0; half < 2; ++half) {
                float& accumulator = accumulators[4 * octet + 2 * half + parity];
                float sum = work.accumulate ? accumulator : 0.0f;
                for (int k = 0; k < 16; ++k)
                    sum += a_rows[half][k] * b_row[k];
                accumulator = sum;
            }
        }
    }
    work.is_executed = true;
}

inline void issue_wgmma(float* accumulators, int tile_n, uint64_t a_descriptor, uint64_t b_descriptor, Major major_a,
                        Major major_b, bool accumulate) {
    EmulatedBlock& block = current_block();
    EmulatedThread& thread = block.thread();
    if (!thread.is_wgmma_fenced) block.fail("wgmma without wgmma_fence since its registers were last accessible");
    block.check_same_in_warpgroup(thread.num_wgmma_issued++, a_descriptor, b_descriptor);

    auto& in_flight = thread.accumulators_in_flight;
    if (std::none_of(in_flight.begin(), in_flight.end(),
                     [&](const AccumulatorsInFlight& entry) { return entry.accumulators == accumulators; })) {
        in_flight.push_back({accumulators, std::vector<float>(accumulators, accumulators + tile_n / 2), 0});
        std::fill_n(accumulators, tile_n / 2, std::bit_cast<float>(kAccumulatorPoison));
    }
    find_accumulators(thread, accumulators).num_pending += 1;
    thread.pending_wgmma.push_back({accumulators, tile_n, a_descriptor, b_descriptor, major_a, major_b, accumulate,
                                    false, thread.num_wgmma_groups});
    // wgmma of one thread execute in order: an early one needs all before it.
    const auto is_executed = [](const PendingWgmma& work) { return work.is_executed; };
    auto& pending = thread.pending_wgmma;
    if (std::all_of(pending.begin(), pending.end() - 1, is_executed) && block.happens_early())
        execute_wgmma(thread, pending.back());
}

inline void retire_wgmma(int num_pending_groups) {
    EmulatedBlock& block = current_block();
    EmulatedThread& thread = block.thread();
    auto& pending = thread.pending_wgmma;
    while (!pending.empty() && pending.front().group_idx < thread.num_wgmma_groups - num_pending_groups) {
        if (!pending.front().is_executed) execute_wgmma(thread, pending.front());
        AccumulatorsInFlight& entry = find_accumulators(thread, pending.front().accumulators);
        pending.erase(pending.begin());
        if (--entry.num_pending > 0) continue;
        for (size_t i = 0; i < entry.values.size(); ++i)
            if (std::bit_cast<uint32_t>(entry.accumulators[i]) != kAccumulatorPoison)
                block.fail("accumulator " + std::to_string(i) + " was written while a wgmma was in flight");
        std::copy(entry.values.begin(), entry.values.end(), entry.accumulators);
        std::swap(entry, thread.accumulators_in_flight.back());
        thread.accumulators_in_flight.pop_back();
        thread.is_wgmma_fenced = false;
    }
    block.sync_warp();  // wait_group is a warp-wide instruction
}

}  // namespace moetrain::emulation

namespace moetrain::ptx {

inline void wgmma_fence() { emulation::current_block().thread().is_wgmma_fenced = true; }

inline void wgmma_commit() { emulation::current_block().thread().num_wgmma_groups += 1; }

template <int kNumPending, int kSize>
void wgmma_wait(float (&)[kSize]) {
    emulation::retire_wgmma(kNumPending);
}

template <int kTileN, Major kMajorA = Major::kK, Major kMajorB = Major::kK>
void wgmma(float (&accumulators)[kTileN / 2], uint64_t a_descriptor, uint64_t b_descriptor, bool accumulate) {
    static_assert(kTileN % 32 == 0 && kTileN >= 32 && kTileN <= 256, "as in ptx/wgmma.h");
    emulation::issue_wgmma(accumulators, kTileN, a_descriptor, b_descriptor, kMajorA, kMajorB, accumulate);
}

}  // namespace moetrain::ptx
