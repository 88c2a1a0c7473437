// Grouped GEMM for Hopper: out[r] = epilogue(A[r] · B[group of r]ᵀ), bf16 in and out, fp32 accumulation.
//
//   A  [R, K], or [T, K] gathered by row_indices [R]; rows sorted by group
//   B  [slots, N, K], both operands K-major; group g multiplies by slot slots[g], or by slot g
//   group_offsets [G + 1] delimits the rows of each group; groups may be empty and of any length
//
// Never run on a GPU so far: checked under emulation and by the compile gate.
//
// Persistent and warp-specialised. Warpgroup 0 loads tiles into a ring of stages: B by TMA, A by TMA or, when
// gathered, by cp.async. Each further warpgroup multiplies 64 rows of the tile and runs the epilogue.
//
// Per stage, full_barrier completes when its tiles have landed, empty_barrier when every consumer warp has read them.
#pragma once

#include <cstdint>

#include "cuda/common/bf16.h"
#include "cuda/common/matrix_descriptor.h"
#include "cuda/grouped_gemm_sm90/epilogue.h"
#include "cuda/grouped_gemm_sm90/tile_scheduler.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/launch.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/shared.h"
#include "cuda/ptx/tma.h"
#include "cuda/ptx/wgmma.h"

namespace moetrain::sm90 {

constexpr int kWarpgroupSize = 128;
constexpr int kRegistersPerBlock = 65536;

template <int kTileN_, int kNumConsumers_, int kNumStages_, bool kGatherA_>
struct GroupedGemmConfig {
    static constexpr int kTileN = kTileN_;
    static constexpr int kNumConsumers = kNumConsumers_;
    static constexpr int kNumStages = kNumStages_;
    static constexpr bool kGatherA = kGatherA_;

    static constexpr int kTileM = 64 * kNumConsumers;
    static constexpr int kTileK = kSwizzleRowElements;
    static constexpr int kNumThreads = kWarpgroupSize * (1 + kNumConsumers);
    static constexpr int kNumConsumerWarps = kNumConsumers * kWarpgroupSize / 32;
    static constexpr int kProducerRegisters = kGatherA ? 56 : 40;
    static constexpr int kConsumerRegisters = kGatherA ? 224 : 232;

    static_assert(kNumStages >= 2, "a stage is released while the next one is being read");
    static_assert(kWarpgroupSize * (kProducerRegisters + kNumConsumers * kConsumerRegisters) <= kRegistersPerBlock);
};

template <class Epilogue>
struct GroupedGemmArguments {
    ptx::TensorMap a_map;  // [1, R, K], boxes [kTileM, kTileK]; unused when A is gathered
    ptx::TensorMap b_map;  // [slots, N, K], boxes [kTileN / kNumColumnBlocks, kTileK]
    const Bf16* a;         // [T, K], 16-byte aligned, K a multiple of 8; used when A is gathered
    const int32_t* row_indices;
    const int32_t* group_offsets;
    const int32_t* slots;  // null: group g has slot g
    int num_groups;
    int num_columns;  // N
    int depth;        // K
    Epilogue epilogue;
};

template <class Config>
struct GroupedGemmStorage {
    alignas(kSwizzleAtomBytes) Bf16 a[Config::kNumStages][Config::kTileM * Config::kTileK];
    alignas(kSwizzleAtomBytes) Bf16 b[Config::kNumStages][Config::kTileN * Config::kTileK];
    alignas(8) uint64_t full_barrier[Config::kNumStages];
    alignas(8) uint64_t empty_barrier[Config::kNumStages];
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
    __device__ int previous_stage_idx() const { return stage_idx == 0 ? kNumStages - 1 : stage_idx - 1; }
};

template <class Config, class Epilogue>
class GroupedGemmBlock {
 public:
    using Arguments = GroupedGemmArguments<Epilogue>;
    using Storage = GroupedGemmStorage<Config>;

    __device__ GroupedGemmBlock(const Arguments& arguments, Storage& storage)
        : arguments_(arguments), storage_(storage) {}

    __device__ void init_barriers() {
        if (ptx::thread_idx() == 0) {
            // TMA: one arrival, with the bytes to expect. Gather: one more from every producer thread.
            constexpr int kNumProducerArrivals = Config::kGatherA ? 1 + kWarpgroupSize : 1;
            for (int stage_idx = 0; stage_idx < Config::kNumStages; ++stage_idx) {
                ptx::mbarrier_init(&storage_.full_barrier[stage_idx], kNumProducerArrivals);
                ptx::mbarrier_init(&storage_.empty_barrier[stage_idx], Config::kNumConsumerWarps);
            }
            ptx::fence_mbarrier_init();
        }
        ptx::sync_block();
    }

    // Called by all threads of the producer warpgroup.
    __device__ void produce() {
        const int thread_idx = ptx::thread_idx();
        if (!Config::kGatherA && thread_idx != 0) return;

        Ring ring;
        Tile tile;
        Scheduler scheduler = make_scheduler();
        while (scheduler.next(tile)) {
            GatheredRows rows{};
            if constexpr (Config::kGatherA) rows = find_rows(tile, thread_idx);
            for (int k = 0; k < arguments_.depth; k += Config::kTileK) {
                // The first lap does not block: on a fresh barrier the phase of parity 1 counts as complete.
                ptx::mbarrier_wait(&storage_.empty_barrier[ring.stage_idx], ring.phase ^ 1);
                if (thread_idx == 0) load_by_tma(tile, k, ring.stage_idx);
                if constexpr (Config::kGatherA) gather_a(rows, k, ring.stage_idx, thread_idx);
                ring.advance();
            }
        }
    }

    // Called by all threads of a consumer warpgroup, which owns rows 64 * consumer_idx and on of every tile.
    __device__ void consume(int consumer_idx) {
        const int thread_idx = ptx::thread_idx() % kWarpgroupSize;
        const int num_k_steps = ceil_div(arguments_.depth, Config::kTileK);

        Ring ring;
        Tile tile;
        Scheduler scheduler = make_scheduler();
        while (scheduler.next(tile)) {
            float accumulators[Config::kTileN / 2];
            for (int k_step = 0; k_step < num_k_steps; ++k_step) {
                ptx::mbarrier_wait(&storage_.full_barrier[ring.stage_idx], ring.phase);
                // cp.async writes through the generic proxy, wgmma reads through the async proxy.
                if constexpr (Config::kGatherA) ptx::fence_async_proxy();
                multiply_stage(accumulators, consumer_idx, ring.stage_idx, /*accumulate=*/k_step > 0);
                // The step just issued may stay in flight; the one before it has finished reading its stage.
                ptx::wgmma_wait<1>(accumulators);
                if (k_step > 0) release_stage(ring.previous_stage_idx());
                ring.advance();
            }
            ptx::wgmma_wait<0>(accumulators);
            release_stage(ring.previous_stage_idx());

            const FragmentPosition position = fragment_position(thread_idx, tile.row_begin + 64 * consumer_idx,
                                                                tile.row_end, tile.n_tile_idx * kColumnBlockSize);
            arguments_.epilogue.template operator()<Config::kTileN>(accumulators, position);
        }
    }

 private:
    using Ring = RingPosition<Config::kNumStages>;
    using Scheduler = TileScheduler<Config::kTileM>;

    static constexpr int kNumColumnBlocks = Epilogue::kNumColumnBlocks;
    static constexpr int kColumnBlockSize = Config::kTileN / kNumColumnBlocks;
    static constexpr int kTileBytesA = Config::kTileM * Config::kTileK * sizeof(Bf16);
    static constexpr int kTileBytesB = Config::kTileN * Config::kTileK * sizeof(Bf16);

    // Eight threads copy the eight chunks of a row, so the warpgroup covers 16 rows at a time.
    static constexpr int kRowsPerPass = kWarpgroupSize / (kSwizzleRowBytes / kChunkBytes);
    static constexpr int kNumPasses = Config::kTileM / kRowsPerPass;

    struct GatheredRows {
        const Bf16* row[kNumPasses];  // null beyond the group's end
    };

    __device__ Scheduler make_scheduler() const {
        const int num_n_tiles = ceil_div(arguments_.num_columns / kNumColumnBlocks, kColumnBlockSize);
        return Scheduler(arguments_.group_offsets, arguments_.num_groups, num_n_tiles, ptx::block_idx(),
                         ptx::num_blocks());
    }

    __device__ void load_by_tma(const Tile& tile, int k, int stage_idx) {
        const int slot = arguments_.slots == nullptr ? tile.group_idx : arguments_.slots[tile.group_idx];
        uint64_t* full_barrier = &storage_.full_barrier[stage_idx];
        ptx::mbarrier_arrive_expect_bytes(full_barrier, kTileBytesB + (Config::kGatherA ? 0 : kTileBytesA));
        if constexpr (!Config::kGatherA)
            ptx::tma_load(storage_.a[stage_idx], &arguments_.a_map, full_barrier, 0, tile.row_begin, k);
#pragma unroll
        for (int block_idx = 0; block_idx < kNumColumnBlocks; ++block_idx) {
            const int row =
                block_idx * (arguments_.num_columns / kNumColumnBlocks) + tile.n_tile_idx * kColumnBlockSize;
            Bf16* box = storage_.b[stage_idx] + block_idx * kColumnBlockSize * Config::kTileK;
            ptx::tma_load(box, &arguments_.b_map, full_barrier, slot, row, k);
        }
    }

    __device__ GatheredRows find_rows(const Tile& tile, int thread_idx) const {
        GatheredRows rows;
#pragma unroll
        for (int pass = 0; pass < kNumPasses; ++pass) {
            const int row = tile.row_begin + pass * kRowsPerPass + thread_idx / 8;
            rows.row[pass] = row < tile.row_end
                                 ? arguments_.a + static_cast<int64_t>(arguments_.row_indices[row]) * arguments_.depth
                                 : nullptr;
        }
        return rows;
    }

    __device__ void gather_a(const GatheredRows& rows, int k, int stage_idx, int thread_idx) {
        const int chunk_idx = thread_idx % 8;
        const int column = k + chunk_idx * kChunkElements;
        uint8_t* tile = reinterpret_cast<uint8_t*>(storage_.a[stage_idx]);
#pragma unroll
        for (int pass = 0; pass < kNumPasses; ++pass) {
            const int row_idx = pass * kRowsPerPass + thread_idx / 8;
            const bool is_valid = rows.row[pass] != nullptr && column < arguments_.depth;
            ptx::cp_async_16_bytes(tile + swizzled_chunk_offset(row_idx, chunk_idx),
                                   is_valid ? rows.row[pass] + column : arguments_.a, is_valid);
        }
        ptx::cp_async_arrive(&storage_.full_barrier[stage_idx]);
    }

    __device__ void multiply_stage(float (&accumulators)[Config::kTileN / 2], int consumer_idx, int stage_idx,
                                   bool accumulate) {
        constexpr int kStepElements = 16;  // K of one wgmma
        const uint32_t a_address = ptx::shared_address(storage_.a[stage_idx] + consumer_idx * 64 * Config::kTileK);
        const uint32_t b_address = ptx::shared_address(storage_.b[stage_idx]);
        ptx::wgmma_fence();
#pragma unroll
        for (int k = 0; k < Config::kTileK; k += kStepElements) {
            const uint32_t k_bytes = k * sizeof(Bf16);
            ptx::wgmma<Config::kTileN>(accumulators, make_k_major_descriptor(a_address + k_bytes),
                                       make_k_major_descriptor(b_address + k_bytes), accumulate || k > 0);
        }
        ptx::wgmma_commit();
    }

    __device__ void release_stage(int stage_idx) {
        if (ptx::thread_idx() % 32 == 0) ptx::mbarrier_arrive(&storage_.empty_barrier[stage_idx]);
    }

    const Arguments& arguments_;
    Storage& storage_;
};

template <class Config, class Epilogue>
__global__ void __launch_bounds__(Config::kNumThreads, 1)
    grouped_gemm_kernel(const __grid_constant__ GroupedGemmArguments<Epilogue> arguments) {
    auto& storage = *reinterpret_cast<GroupedGemmStorage<Config>*>(ptx::dynamic_shared_memory());
    GroupedGemmBlock<Config, Epilogue> block(arguments, storage);
    block.init_barriers();

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
