// Grouped GEMM for Ampere and later, groups along M: epilogue(A[r] · B[group of r]ᵀ) for each row r, bf16 in, fp32
// accumulation.
//
//   A  [R, K], or [T, K] gathered by row_indices [R]; rows sorted by group
//   B  [slots, N, K] (K-major) or [slots, K, N] (MN-major); group g multiplies by slot slots[g], or by slot g
//   group_offsets [G + 1] delimits the rows of each group; groups may be empty and of any length
//
// Persistent, see pipeline.h. What lies outside the matrices is copied as zeros.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/grouped_gemm/epilogue.h"
#include "cuda/grouped_gemm/sm80/pipeline.h"
#include "cuda/grouped_gemm/tile_scheduler.h"

namespace moetrain::sm80 {

template <class Epilogue>
struct GroupedGemmArguments {
    const Bf16* a;  // rows a_stride apart
    const Bf16* b;  // rows b_row_stride apart, slots b_slot_stride
    int64_t b_slot_stride;
    int a_stride;
    int b_row_stride;
    const int32_t* row_indices;  // null: A's rows in order
    const int32_t* group_offsets;
    const int32_t* slots;  // null: group g has slot g
    int num_groups;
    int num_columns;  // N
    int depth;        // K
    Epilogue epilogue;
};

// Copies a block's steps, one tile after the other, ahead of those who multiply.
template <class Config, class Epilogue>
class RowLoader {
 public:
    using Arguments = GroupedGemmArguments<Epilogue>;
    using Storage = PipelineStorage<Config>;

    __device__ RowLoader(const Arguments& arguments, Storage& storage)
        : arguments_(arguments), storage_(storage), scheduler_(make_tile_scheduler<Config>(arguments)) {
        open_tile();
    }

    __device__ void load_next(int stage_idx) {
        if (has_tile_) {
            copy_a(storage_.a[stage_idx]);
            copy_b(storage_.b[stage_idx]);
            k_ += kStepDepth;
            if (k_ >= arguments_.depth) open_tile();
        }
        ptx::cp_async_commit();
    }

 private:
    static constexpr int kNumColumnBlocks = Epilogue::kNumColumnBlocks;
    static constexpr int kTilePart = Config::kTileN / kNumColumnBlocks;
    using CopyA = TileCopy<Config, Major::kK, Config::kTileM>;
    using CopyB = TileCopy<Config, Config::kMajorB, Config::kTileN>;
    static_assert(Config::kMajorA == Major::kK, "rows of A are contiguous");
    static_assert(Config::kMajorB == Major::kK || kNumColumnBlocks == 1);
    static_assert(CopyB::kIsMnMajor || kTilePart % CopyB::kRowsPerPass == 0, "a pass copies rows of one part");

    // The indices of the next tile's rows are on their way until its first step is copied.
    __device__ void open_tile() {
        Tile tile;
        has_tile_ = scheduler_.next(tile);
        if (!has_tile_) return;
        k_ = 0;
        column_ = tile.n_tile_idx * kTilePart;
        slot_b_ = arguments_.b + slot_of(arguments_, tile) * arguments_.b_slot_stride;
        rows_left_ = tile.row_end - tile.row_begin - CopyA::row(0);
#pragma unroll
        for (int pass = 0; pass < CopyA::kNumPasses; ++pass) {
            // Beyond the group the last row, which is then not copied: a load without a branch.
            const int row = std::min(tile.row_begin + CopyA::row(pass), tile.row_end - 1);
            rows_[pass] = arguments_.row_indices == nullptr ? row : arguments_.row_indices[row];
        }
    }

    __device__ void copy_a(Bf16* tile) const {
        const int k = k_ + CopyA::column();
#pragma unroll
        for (int pass = 0; pass < CopyA::kNumPasses; ++pass)
            CopyA::copy(tile, pass, arguments_.a + int64_t{rows_[pass]} * arguments_.a_stride + k,
                        pass * CopyA::kRowsPerPass < rows_left_ && k < arguments_.depth);
    }

    __device__ void copy_b(Bf16* tile) const {
        if constexpr (CopyB::kIsMnMajor)
            copy_mn_major_b(tile);
        else
            copy_k_major_b(tile);
    }

    __device__ void copy_k_major_b(Bf16* tile) const {
        const int part_columns = arguments_.num_columns / kNumColumnBlocks;
        const int k = k_ + CopyB::column();
#pragma unroll
        for (int pass = 0; pass < CopyB::kNumPasses; ++pass) {
            const int part = pass * CopyB::kRowsPerPass / kTilePart;
            const int column = column_ + CopyB::row(pass) - part * kTilePart;  // in the part
            const int64_t row = part * part_columns + column;
            CopyB::copy(tile, pass, slot_b_ + row * arguments_.b_row_stride + k,
                        column < part_columns && k < arguments_.depth);
        }
    }

    __device__ void copy_mn_major_b(Bf16* tile) const {
        const int column = column_ + CopyB::column();
#pragma unroll
        for (int pass = 0; pass < CopyB::kNumPasses; ++pass) {
            const int k = k_ + CopyB::row(pass);
            CopyB::copy(tile, pass, slot_b_ + int64_t{k} * arguments_.b_row_stride + column,
                        column < arguments_.num_columns && k < arguments_.depth);
        }
    }

    const Arguments& arguments_;
    Storage& storage_;
    TileScheduler<Config::kTileM> scheduler_;
    const Bf16* slot_b_ = nullptr;
    int rows_[CopyA::kNumPasses] = {};  // of A's data
    int rows_left_ = 0;                 // of the group, from this thread's first
    int column_ = 0;                    // of the tile's first, in each part
    int k_ = 0;
    bool has_tile_ = false;
};

template <class Config, class Epilogue>
__global__ void __launch_bounds__(Config::kNumThreads, Config::kBlocksPerMultiprocessor)
    grouped_gemm_kernel(const __grid_constant__ GroupedGemmArguments<Epilogue> arguments) {
    using TilePipeline = Pipeline<Config, Epilogue::kNumColumnBlocks>;
    auto& storage = *reinterpret_cast<PipelineStorage<Config>*>(ptx::dynamic_shared_memory());
    RowLoader<Config, Epilogue> loader(arguments, storage);
    TilePipeline pipeline(storage);
    pipeline.fill(loader);
    auto scheduler = make_tile_scheduler<Config>(arguments);
    Tile tile;
    while (scheduler.next(tile)) {
        typename TilePipeline::Accumulators accumulators;
        pipeline.multiply_tile(accumulators, loader, ceil_div(arguments.depth, kStepDepth));
#pragma unroll
        for (int block = 0; block < Config::kRowBlocks; ++block) {
            const FragmentPosition position =
                fragment_position(tile.row_begin + pipeline.warp_row() + block * kMmaRows, tile.row_end,
                                  tile.n_tile_idx * TilePipeline::kTilePart + pipeline.warp_column(),
                                  tile.n_tile_idx * Config::kWarpsN + pipeline.warp_n_idx(), slot_of(arguments, tile));
            arguments.epilogue.template operator()<Config::kWarpN>(accumulators[block], position);
        }
    }
}

}  // namespace moetrain::sm80
