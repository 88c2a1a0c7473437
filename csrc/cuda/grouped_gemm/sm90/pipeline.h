// What Hopper's grouped GEMMs share: a ring of stages between one producer warpgroup and its consumers, and the
// products of one tile. bf16 operands in shared memory, fp32 accumulators in registers.
//
// Warpgroup 0 loads tiles of A and B into the ring. Each further warpgroup multiplies and runs the epilogue. Per stage,
// full_barrier completes when its tiles have landed, empty_barrier when every warp that reads them has.
#pragma once

#include <cstdint>

#include "cuda/common/bf16.h"
#include "cuda/common/major.h"
#include "cuda/common/matrix_descriptor.h"
#include "cuda/grouped_gemm/epilogue.h"
#include "cuda/ptx/launch.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/shared.h"
#include "cuda/ptx/wgmma.h"

namespace moetrain::sm90 {

using namespace gemm;

constexpr int kWarpgroupSize = 128;
constexpr int kRegistersPerMultiprocessor = 65536;
constexpr int kRowsPerWgmma = 64;

enum class Schedule : uint8_t {
    kCooperative,  // the consumers share the rows of each tile
    kPingPong,     // two consumers take tiles in turn: the epilogue of one runs beside the products of the other
};

struct GemmShape {
    int tile_m;
    int tile_n;
    int num_stages;
    int num_consumers = 2;
    Major major_a = Major::kK;
    Major major_b = Major::kK;
    bool uses_cp_async = false;  // by the whole producer warpgroup, besides TMA
    Schedule schedule = Schedule::kCooperative;
};

template <GemmShape kShape>
struct GemmConfig {
    static constexpr int kTileM = kShape.tile_m;
    static constexpr int kTileN = kShape.tile_n;
    static constexpr int kTileK = kSwizzleRowElements;
    static constexpr int kNumStages = kShape.num_stages;
    static constexpr int kNumConsumers = kShape.num_consumers;
    static constexpr Major kMajorA = kShape.major_a;
    static constexpr Major kMajorB = kShape.major_b;
    static constexpr bool kUsesCpAsync = kShape.uses_cp_async;
    static constexpr bool kPingPong = kShape.schedule == Schedule::kPingPong;

    static constexpr int kNumThreads = kWarpgroupSize * (1 + kNumConsumers);
    static constexpr int kConsumersPerTile = kPingPong ? 1 : kNumConsumers;
    static constexpr int kRowBlocks = kTileM / kRowsPerWgmma / kConsumersPerTile;  // of one consumer
    static constexpr int kProducerRegisters = kUsesCpAsync ? 56 : 40;
    static constexpr int kConsumerRegisters = kUsesCpAsync ? 224 : 232;

    static_assert(kTileM == kRowsPerWgmma * kConsumersPerTile * kRowBlocks && kRowBlocks >= 1);
    static_assert(!kPingPong || kNumConsumers == 2, "two take turns");
    static_assert(kNumStages >= 2, "a stage is released while the next one is being read");
    // setmaxnreg deals out what the block was launched with, no more: registers per thread are multiples of 8.
    static constexpr int kRegistersAtLaunch = kRegistersPerMultiprocessor / kNumThreads / 8 * 8;
    static_assert(kWarpgroupSize * (kProducerRegisters + kNumConsumers * kConsumerRegisters) <=
                  kNumThreads * kRegistersAtLaunch);
};

template <class Config>
struct PipelineStorage {
    alignas(kSwizzleAtomBytes) Bf16 a[Config::kNumStages][Config::kTileM * Config::kTileK];
    alignas(kSwizzleAtomBytes) Bf16 b[Config::kNumStages][Config::kTileN * Config::kTileK];
    alignas(8) uint64_t full_barrier[Config::kNumStages];
    alignas(8) uint64_t empty_barrier[Config::kNumStages];
    alignas(8) uint64_t turn_barrier[2];  // of ping-pong: completes when the other consumer has issued its products
};

// Position in the ring of stages; `phase` is the parity of the current lap.
template <int kNumStages>
struct RingPosition {
    int stage_idx = 0;
    uint32_t phase = 0;

    __device__ void advance() {
        if (++stage_idx < kNumStages) return;
        stage_idx = 0;
        phase ^= 1;
    }
    __device__ void skip(int num_stages) {
        const int sum = stage_idx + num_stages;
        stage_idx = sum % kNumStages;
        phase ^= sum / kNumStages & 1;
    }
    __device__ int previous_stage_idx() const { return stage_idx == 0 ? kNumStages - 1 : stage_idx - 1; }
};

template <class Config>
class Pipeline {
 public:
    using Storage = PipelineStorage<Config>;
    using Ring = RingPosition<Config::kNumStages>;
    using Accumulators = float[Config::kRowBlocks][Config::kTileN / 2];

    // Bytes of a tile's columns or rows, 64 of them, in either layout: [64][64] bf16.
    static constexpr int kBlockElements = kRowsPerWgmma * Config::kTileK;
    static constexpr int kTileBytesA = Config::kTileM * Config::kTileK * sizeof(Bf16);
    static constexpr int kTileBytesB = Config::kTileN * Config::kTileK * sizeof(Bf16);

    __device__ explicit Pipeline(Storage& storage) : storage_(storage) {}

    __device__ void init_barriers() {
        if (ptx::thread_idx() == 0) {
            // TMA: one arrival, with the bytes to expect. cp.async: one more from every producer thread.
            constexpr int kNumProducerArrivals = Config::kUsesCpAsync ? 1 + kWarpgroupSize : 1;
            constexpr int kWarps = kWarpgroupSize / 32;
            for (int stage_idx = 0; stage_idx < Config::kNumStages; ++stage_idx) {
                ptx::mbarrier_init(&storage_.full_barrier[stage_idx], kNumProducerArrivals);
                ptx::mbarrier_init(&storage_.empty_barrier[stage_idx], Config::kConsumersPerTile * kWarps);
            }
            for (uint64_t& barrier : storage_.turn_barrier)
                ptx::mbarrier_init(&barrier, kWarps);
            ptx::fence_mbarrier_init();
        }
        ptx::sync_block();
    }

    // The first lap does not block: on a fresh barrier the phase of parity 1 counts as complete.
    __device__ void wait_until_empty(const Ring& ring) {
        ptx::mbarrier_wait(&storage_.empty_barrier[ring.stage_idx], ring.phase ^ 1);
    }

    // Sets `accumulators` to this consumer's rows of the sum over the next `num_k_steps` stages, which it releases.
    __device__ void multiply_tile(Accumulators& accumulators, Ring& ring, int num_k_steps, int consumer_idx,
                                  int num_own_tiles) {
        set_to_zero(accumulators);  // there may be no step
        if constexpr (Config::kPingPong) wait_for_turn(consumer_idx, num_own_tiles);
        for (int k_step = 0; k_step < num_k_steps; ++k_step) {
            ptx::mbarrier_wait(&storage_.full_barrier[ring.stage_idx], ring.phase);
            // cp.async writes through the generic proxy, wgmma reads through the async proxy.
            if constexpr (Config::kUsesCpAsync) ptx::fence_async_proxy();
            multiply_stage(accumulators, consumer_idx, ring.stage_idx);
            // The step just issued may stay in flight; the one before it has finished reading its stage.
            wait<1>(accumulators);
            if (k_step > 0) release_stage(ring.previous_stage_idx());
            ring.advance();
        }
        if constexpr (Config::kPingPong) pass_turn(consumer_idx);
        wait<0>(accumulators);
        if (num_k_steps > 0) release_stage(ring.previous_stage_idx());
    }

 private:
    template <int kNumPending>
    __device__ static void wait(Accumulators& accumulators) {
#pragma unroll
        for (auto& row_block : accumulators)
            ptx::wgmma_wait<kNumPending>(row_block);
    }

    __device__ static void set_to_zero(Accumulators& accumulators) {
#pragma unroll
        for (auto& row_block : accumulators)
#pragma unroll
            for (float& accumulator : row_block)
                accumulator = 0;
    }

    // A step of `k` along K from the tile's start.
    template <Major kMajor>
    __device__ static uint64_t descriptor_at(uint32_t tile_address, int k) {
        if constexpr (kMajor == Major::kK)
            return make_k_major_descriptor(tile_address + k * static_cast<int>(sizeof(Bf16)));
        else
            return make_mn_major_descriptor(tile_address + k * kSwizzleRowBytes, kBlockElements * sizeof(Bf16));
    }

    __device__ void multiply_stage(Accumulators& accumulators, int consumer_idx, int stage_idx) {
        constexpr int kStepElements = 16;  // K of one wgmma
        const int first_block = Config::kPingPong ? 0 : consumer_idx * Config::kRowBlocks;
        const uint32_t a_address = ptx::shared_address(storage_.a[stage_idx] + first_block * kBlockElements);
        const uint32_t b_address = ptx::shared_address(storage_.b[stage_idx]);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < Config::kTileK; k += kStepElements) {
            const uint64_t b_descriptor = descriptor_at<Config::kMajorB>(b_address, k);
#pragma unroll
            for (int block = 0; block < Config::kRowBlocks; ++block) {
                const uint32_t block_address = a_address + block * kBlockElements * static_cast<int>(sizeof(Bf16));
                ptx::wgmma<Config::kTileN, Config::kMajorA, Config::kMajorB>(
                    accumulators[block], descriptor_at<Config::kMajorA>(block_address, k), b_descriptor,
                    /*accumulate=*/true);
            }
        }
        ptx::wgmma_commit();
    }

    __device__ void release_stage(int stage_idx) {
        if (ptx::thread_idx() % 32 == 0) ptx::mbarrier_arrive(&storage_.empty_barrier[stage_idx]);
    }

    // Consumer 0 goes first: its i-th tile waits for tile i - 1 of consumer 1, whose i-th waits for tile i of consumer
    // 0.
    __device__ void wait_for_turn(int consumer_idx, int num_own_tiles) {
        ptx::mbarrier_wait(&storage_.turn_barrier[consumer_idx], (num_own_tiles ^ consumer_idx ^ 1) & 1);
    }
    __device__ void pass_turn(int consumer_idx) {
        if (ptx::thread_idx() % 32 == 0) ptx::mbarrier_arrive(&storage_.turn_barrier[consumer_idx ^ 1]);
    }

    Storage& storage_;
};

// Of a warpgroup's row block, the first of the 16 rows whose accumulators this thread's warp has.
__device__ inline int first_row_of_warp(int row_block) {
    return kRowsPerWgmma * row_block + ptx::thread_idx() % kWarpgroupSize / 32 * 16;
}

// The roles of a block; `Block` has produce() and consume(consumer_idx).
template <class Config, class Block>
__device__ void run_warpgroups(Block& block) {
    const int warpgroup_idx = ptx::thread_idx() / kWarpgroupSize;
    if (warpgroup_idx == 0) {
        ptx::shrink_registers<Config::kProducerRegisters>();
        block.produce();
    } else {
        ptx::grow_registers<Config::kConsumerRegisters>();
        block.consume(warpgroup_idx - 1);
    }
}

}  // namespace moetrain::sm90
