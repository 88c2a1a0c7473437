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

// Sixteen consecutive K values of row `row_idx` of a K-major tile.
inline void read_operand_row(uint64_t descriptor, int row_idx, const EmulatedThread& reader, float (&values)[16]) {
    EmulatedBlock& block = current_block();
    const auto start = static_cast<uint32_t>(descriptor & 0x3FFF) << 4;
    const auto stride_bytes = static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4;
    const auto base_offset = static_cast<uint32_t>(descriptor >> 49 & 7);
    const auto swizzle_mode = static_cast<uint32_t>(descriptor >> 62);
    if (swizzle_mode != 1)
        block.fail("descriptor " + hex(descriptor) + " has swizzle mode " + std::to_string(swizzle_mode) +
                   "; the emulation knows 1 (128 bytes)");
    if (base_offset != 0 || (start & 0x380) != 0)
        block.fail("descriptor " + hex(descriptor) + ": the tile must start on a 1024-byte boundary, base offset 0");
    const auto row = static_cast<uint32_t>(row_idx);
    for (uint32_t chunk_idx = 0; chunk_idx < 2; ++chunk_idx) {
        const uint32_t address = start + row / 8 * stride_bytes + row % 8 * 128 + chunk_idx * 16;
        const uint8_t* chunk = block.read_async_proxy(address ^ ((address >> 7 & 7) << 4), reader);
        uint16_t bits[8];
        std::memcpy(bits, chunk, sizeof(bits));
        for (int i = 0; i < 8; ++i)
            values[8 * chunk_idx + i] = std::bit_cast<float>(uint32_t{bits[i]} << 16);
    }
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
    float a_rows[2][16];
    for (int half = 0; half < 2; ++half)
        read_operand_row(work.a_descriptor, 16 * warp_idx + lane_idx / 4 + 8 * half, thread, a_rows[half]);
    for (int octet = 0; octet < work.tile_n / 8; ++octet) {
        for (int parity = 0; parity < 2; ++parity) {
            float b_row[16];
            read_operand_row(work.b_descriptor, 8 * octet + 2 * (lane_idx % 4) + parity, thread, b_row);
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

inline void issue_wgmma(float* accumulators, int tile_n, uint64_t a_descriptor, uint64_t b_descriptor,
                        bool accumulate) {
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
    thread.pending_wgmma.push_back(
        {accumulators, tile_n, a_descriptor, b_descriptor, accumulate, false, thread.num_wgmma_groups});
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

template <int kTileN>
void wgmma(float (&accumulators)[kTileN / 2], uint64_t a_descriptor, uint64_t b_descriptor, bool accumulate) {
    static_assert(kTileN == 64 || kTileN == 128 || kTileN == 256, "as in ptx/wgmma.h");
    emulation::issue_wgmma(accumulators, kTileN, a_descriptor, b_descriptor, accumulate);
}

}  // namespace moetrain::ptx
