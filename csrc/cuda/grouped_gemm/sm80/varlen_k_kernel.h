// Grouped GEMM for Ampere and later, groups along K: C[s] = sum over the rows r of slot s's groups of A[r]ᵀ · B[r], the
// gradient of stacked weights. bf16 in, fp32 accumulation.
//
//   A  [R, I] and B [R, J], each its own rows or [T, width] gathered by row_indices [R]; rows sorted by group
//   a slot sums its groups in ascending order, every group's rows in order; one without rows gives zeros
//
// Both operands are MN-major. A step takes 32 rows of one group; beyond the group's end both are zeros, whatever lies
// there. Persistent, see pipeline.h.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/grouped_gemm/epilogue.h"
#include "cuda/grouped_gemm/sm80/pipeline.h"
#include "cuda/grouped_gemm/tile_scheduler.h"

namespace moetrain::sm80 {

struct VarlenKOperand {
    const Bf16* data;
    const int32_t* row_indices;  // null: rows in order
    int stride;
    int width;
};

template <class Epilogue>
struct VarlenKArguments {
    VarlenKOperand a;
    VarlenKOperand b;
    const int32_t* group_offsets;
    const int32_t* slot_offsets;  // null: slot s has group s
    const int32_t* slot_groups;
    int num_slots;
    Epilogue epilogue;  // takes rows s * I + i
};

// One operand's part of a step: which rows this thread copies, and from where.
template <class Config, int kWidth>
class OperandStep {
 public:
    // Reads the rows' indices, which are on their way until the step is copied.
    __device__ void find_rows(const VarlenKOperand& operand, const RowStep& step, int tile_column) {
        column_ = tile_column + Copy::column();
        rows_left_ = step.row_end - step.row_begin - Copy::row(0);
#pragma unroll
        for (int pass = 0; pass < Copy::kNumPasses; ++pass) {
            // Beyond the group the last row, which is then not copied: a load without a branch.
            const int row = std::min(step.row_begin + Copy::row(pass), step.row_end - 1);
            rows_[pass] = operand.row_indices == nullptr ? row : operand.row_indices[row];
        }
    }

    __device__ void copy(const VarlenKOperand& operand, Bf16* tile) const {
#pragma unroll
        for (int pass = 0; pass < Copy::kNumPasses; ++pass)
            Copy::copy(tile, pass, operand.data + int64_t{rows_[pass]} * operand.stride + column_,
                       pass * Copy::kRowsPerPass < rows_left_ && column_ < operand.width);
    }

 private:
    using Copy = TileCopy<Config, Major::kMn, kWidth>;

    int rows_[Copy::kNumPasses] = {};  // of the operand's data
    int rows_left_ = 0;                // of the group, from this thread's first
    int column_ = 0;
};

// Copies a block's steps, one tile after the other, ahead of those who multiply.
template <class Config, class Epilogue>
class SlotLoader {
 public:
    using Arguments = VarlenKArguments<Epilogue>;
    using Storage = PipelineStorage<Config>;

    __device__ SlotLoader(const Arguments& arguments, Storage& storage)
        : arguments_(arguments), storage_(storage), scheduler_(make_slot_scheduler<Config>(arguments)) {
        find_step();
    }

    __device__ void load_next(int stage_idx) {
        if (has_step_) {
            a_.copy(arguments_.a, storage_.a[stage_idx]);
            b_.copy(arguments_.b, storage_.b[stage_idx]);
            find_step();
        }
        ptx::cp_async_commit();
    }

 private:
    static_assert(Config::kMajorA == Major::kMn && Config::kMajorB == Major::kMn);

    __device__ void find_step() {
        RowStep step;
        while (!(has_step_ = rows_.next(step))) {
            if (!scheduler_.next(tile_)) return;
            rows_ = rows_of<kStepDepth>(arguments_, tile_.slot);
        }
        a_.find_rows(arguments_.a, step, tile_.m_tile_idx * Config::kTileM);
        b_.find_rows(arguments_.b, step, tile_.n_tile_idx * Config::kTileN);
    }

    const Arguments& arguments_;
    Storage& storage_;
    SlotTileScheduler scheduler_;
    SlotTile tile_{};
    SlotRowWalk<kStepDepth> rows_;
    OperandStep<Config, Config::kTileM> a_;
    OperandStep<Config, Config::kTileN> b_;
    bool has_step_ = false;
};

template <class Config, class Epilogue>
__global__ void __launch_bounds__(Config::kNumThreads, Config::kBlocksPerMultiprocessor)
    varlen_k_gemm_kernel(const __grid_constant__ VarlenKArguments<Epilogue> arguments) {
    using TilePipeline = Pipeline<Config, 1>;
    auto& storage = *reinterpret_cast<PipelineStorage<Config>*>(ptx::dynamic_shared_memory());
    SlotLoader<Config, Epilogue> loader(arguments, storage);
    TilePipeline pipeline(storage);
    pipeline.fill(loader);
    SlotTileScheduler scheduler = make_slot_scheduler<Config>(arguments);
    SlotTile tile;
    while (scheduler.next(tile)) {
        typename TilePipeline::Accumulators accumulators;
        pipeline.multiply_tile(accumulators, loader, rows_of<kStepDepth>(arguments, tile.slot).num_steps());
        const int slot_row = tile.slot * arguments.a.width;
        const int warp_row = slot_row + tile.m_tile_idx * Config::kTileM + pipeline.warp_row();
        const int column = tile.n_tile_idx * Config::kTileN + pipeline.warp_column();
#pragma unroll
        for (int block = 0; block < Config::kRowBlocks; ++block) {
            const FragmentPosition position = fragment_position(
                warp_row + block * kMmaRows, slot_row + arguments.a.width, column, tile.n_tile_idx, tile.slot);
            arguments.epilogue.template operator()<Config::kWarpN>(accumulators[block], position);
        }
    }
}

}  // namespace moetrain::sm80
