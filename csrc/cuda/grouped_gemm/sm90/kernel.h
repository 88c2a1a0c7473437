// Grouped GEMM for Hopper, groups along M: epilogue(A[r] · B[group of r]ᵀ) for each row r, bf16 in, fp32 accumulation.
//
//   A  [R, K], or [T, K] gathered by row_indices [R]; rows sorted by group
//   B  [slots, N, K] (K-major) or [slots, K, N] (MN-major); group g multiplies by slot slots[g], or by slot g
//   group_offsets [G + 1] delimits the rows of each group; groups may be empty and of any length
//
// Persistent and warp-specialised, see pipeline.h. B comes by TMA, A by TMA or, when gathered, by cp.async.
#pragma once

#include <cstdint>

#include "cuda/grouped_gemm/epilogue.h"
#include "cuda/grouped_gemm/sm90/pipeline.h"
#include "cuda/grouped_gemm/tile_scheduler.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/tma.h"

namespace moetrain::sm90 {

template <class Epilogue>
struct GroupedGemmArguments {
    ptx::TensorMap a_map;  // [1, R, K], boxes [kTileM, kTileK]; unused when A is gathered
    ptx::TensorMap b_map;  // K-major: boxes [kTileN / kNumColumnBlocks, kTileK]; MN-major: boxes [kTileK, 64]
    const Bf16* a;         // [T, K], rows a_stride apart; used when A is gathered
    int64_t a_stride;
    const int32_t* row_indices;
    const int32_t* group_offsets;
    const int32_t* slots;  // null: group g has slot g
    int num_groups;
    int num_columns;  // N
    int depth;        // K
    Epilogue epilogue;
};

template <class Config, class Epilogue>
class GroupedGemmBlock {
 public:
    using Arguments = GroupedGemmArguments<Epilogue>;
    using Storage = PipelineStorage<Config>;

    __device__ GroupedGemmBlock(const Arguments& arguments, Storage& storage)
        : arguments_(arguments), storage_(storage), pipeline_(storage) {}

    __device__ void init_barriers() { pipeline_.init_barriers(); }

    // Called by all threads of the producer warpgroup.
    __device__ void produce() {
        const int thread_idx = ptx::thread_idx();
        if (!kGatherA && thread_idx != 0) return;

        Ring ring;
        Tile tile;
        auto scheduler = make_tile_scheduler<Config>(arguments_);
        while (scheduler.next(tile)) {
            GatheredRows rows{};
            if constexpr (kGatherA) rows = find_rows(tile, thread_idx);
            for (int k = 0; k < arguments_.depth; k += Config::kTileK) {
                pipeline_.wait_until_empty(ring);
                if (thread_idx == 0) load_by_tma(tile, k, ring.stage_idx);
                if constexpr (kGatherA) gather_a(rows, k, ring.stage_idx, thread_idx);
                ring.advance();
            }
        }
    }

    // Called by all threads of a consumer warpgroup.
    __device__ void consume(int consumer_idx) {
        const int num_k_steps = ceil_div(arguments_.depth, Config::kTileK);

        Ring ring;
        Tile tile;
        auto scheduler = make_tile_scheduler<Config>(arguments_);
        for (int tile_count = 0; scheduler.next(tile); ++tile_count) {
            if (Config::kPingPong && tile_count % 2 != consumer_idx) {
                ring.skip(num_k_steps);
                continue;
            }
            typename Pipeline<Config>::Accumulators accumulators;
            pipeline_.multiply_tile(accumulators, ring, num_k_steps, consumer_idx, tile_count / 2);
            run_epilogue(accumulators, tile, consumer_idx);
        }
    }

 private:
    using Ring = typename Pipeline<Config>::Ring;

    static constexpr bool kGatherA = Config::kUsesCpAsync;
    static constexpr int kNumColumnBlocks = Epilogue::kNumColumnBlocks;
    static constexpr int kColumnBlockSize = Config::kTileN / kNumColumnBlocks;
    static constexpr int kTileBytesA = Pipeline<Config>::kTileBytesA;
    static constexpr int kTileBytesB = Pipeline<Config>::kTileBytesB;
    static_assert(Config::kMajorA == Major::kK, "rows of A are contiguous");
    static_assert(Config::kMajorB == Major::kK || (kNumColumnBlocks == 1 && Config::kTileN % kSwizzleRowElements == 0));

    // Eight threads copy the eight chunks of a row, so the warpgroup covers 16 rows at a time.
    static constexpr int kRowsPerPass = kWarpgroupSize / (kSwizzleRowBytes / kChunkBytes);
    static constexpr int kNumPasses = Config::kTileM / kRowsPerPass;

    struct GatheredRows {
        const Bf16* row[kNumPasses];  // null beyond the group's end
    };

    __device__ void load_by_tma(const Tile& tile, int k, int stage_idx) {
        uint64_t* full_barrier = &storage_.full_barrier[stage_idx];
        ptx::mbarrier_arrive_expect_bytes(full_barrier, kTileBytesB + (kGatherA ? 0 : kTileBytesA));
        if constexpr (!kGatherA)
            ptx::tma_load(storage_.a[stage_idx], &arguments_.a_map, full_barrier, 0, tile.row_begin, k);
        if constexpr (Config::kMajorB == Major::kK)
            load_b(tile, k, stage_idx);
        else
            load_mn_major_b(tile, k, stage_idx);
    }

    __device__ void load_b(const Tile& tile, int k, int stage_idx) {
        const int slot = slot_of(arguments_, tile);
#pragma unroll
        for (int block_idx = 0; block_idx < kNumColumnBlocks; ++block_idx) {
            const int row =
                block_idx * (arguments_.num_columns / kNumColumnBlocks) + tile.n_tile_idx * kColumnBlockSize;
            Bf16* box = storage_.b[stage_idx] + block_idx * kColumnBlockSize * Config::kTileK;
            ptx::tma_load(box, &arguments_.b_map, &storage_.full_barrier[stage_idx], slot, row, k);
        }
    }

    __device__ void load_mn_major_b(const Tile& tile, int k, int stage_idx) {
        const int slot = slot_of(arguments_, tile);
#pragma unroll
        for (int column = 0; column < Config::kTileN; column += kSwizzleRowElements) {
            Bf16* box = storage_.b[stage_idx] + column * Config::kTileK;
            ptx::tma_load(box, &arguments_.b_map, &storage_.full_barrier[stage_idx], slot, k,
                          tile.n_tile_idx * Config::kTileN + column);
        }
    }

    __device__ GatheredRows find_rows(const Tile& tile, int thread_idx) const {
        GatheredRows rows;
#pragma unroll
        for (int pass = 0; pass < kNumPasses; ++pass) {
            const int row = tile.row_begin + pass * kRowsPerPass + thread_idx / 8;
            rows.row[pass] =
                row < tile.row_end ? arguments_.a + arguments_.row_indices[row] * arguments_.a_stride : nullptr;
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

    __device__ void run_epilogue(const typename Pipeline<Config>::Accumulators& accumulators, const Tile& tile,
                                 int consumer_idx) const {
        const int first_block = Config::kPingPong ? 0 : consumer_idx * Config::kRowBlocks;
        const int slot = slot_of(arguments_, tile);
#pragma unroll
        for (int block = 0; block < Config::kRowBlocks; ++block) {
            const FragmentPosition position =
                fragment_position(tile.row_begin + first_row_of_warp(first_block + block), tile.row_end,
                                  tile.n_tile_idx * kColumnBlockSize, tile.n_tile_idx, slot);
            arguments_.epilogue.template operator()<Config::kTileN>(accumulators[block], position);
        }
    }

    const Arguments& arguments_;
    Storage& storage_;
    Pipeline<Config> pipeline_;
};

template <class Config, class Epilogue>
__global__ void __launch_bounds__(Config::kNumThreads, 1)
    grouped_gemm_kernel(const __grid_constant__ GroupedGemmArguments<Epilogue> arguments) {
    auto& storage = *reinterpret_cast<PipelineStorage<Config>*>(ptx::dynamic_shared_memory());
    GroupedGemmBlock<Config, Epilogue> block(arguments, storage);
    block.init_barriers();
    run_warpgroups<Config>(block);
}

}  // namespace moetrain::sm90
