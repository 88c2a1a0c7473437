// Grouped GEMM for Hopper, groups along K: C[s] = sum over the rows r of slot s's groups of A[r]ᵀ · B[r], the gradient
// of stacked weights. bf16 in, fp32 accumulation.
//
//   A  [R, I] and B [R, J], each its own rows or [T, width] gathered by row_indices [R]; rows sorted by group
//   a slot sums its groups in ascending order, every group's rows in order; one without rows gives zeros
//
// Both operands are MN-major. A step takes 64 rows of one group. An operand in place comes by TMA; where the step would
// reach into the next group, and for gathered rows, cp.async copies rows and writes zeros beyond the group's end: what
// lies there may be anything. Persistent and warp-specialised, see pipeline.h.
#pragma once

#include <cstdint>

#include "cuda/grouped_gemm/epilogue.h"
#include "cuda/grouped_gemm/sm90/pipeline.h"
#include "cuda/grouped_gemm/tile_scheduler.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/tma.h"

namespace moetrain::sm90 {

struct VarlenKOperand {
    ptx::TensorMap map;  // [1, R, width], boxes [64, 64]; unused where rows are gathered
    const Bf16* data;
    int64_t stride;
    const int32_t* row_indices;
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

template <class Config, class Epilogue>
class VarlenKBlock {
 public:
    using Arguments = VarlenKArguments<Epilogue>;
    using Storage = PipelineStorage<Config>;

    __device__ VarlenKBlock(const Arguments& arguments, Storage& storage)
        : arguments_(arguments), storage_(storage), pipeline_(storage) {}

    __device__ void init_barriers() { pipeline_.init_barriers(); }

    // Called by all threads of the producer warpgroup.
    __device__ void produce() {
        Ring ring;
        SlotTile tile;
        auto scheduler = make_slot_scheduler<Config>(arguments_);
        while (scheduler.next(tile)) {
            SlotRows rows = rows_of<Config::kTileK>(arguments_, tile.slot);
            RowStep step;
            SourceRows sources;
            bool has_step = next_step(rows, step, sources);
            while (has_step) {
                // The next step's indices are on their way while this one waits and copies.
                RowStep next;
                SourceRows next_sources;
                const bool has_next = next_step(rows, next, next_sources);
                pipeline_.wait_until_empty(ring);
                load_step(tile, step, sources, ring.stage_idx);
                ring.advance();
                step = next;
                sources = next_sources;
                has_step = has_next;
            }
        }
    }

    // Called by all threads of a consumer warpgroup.
    __device__ void consume(int consumer_idx) {
        Ring ring;
        SlotTile tile;
        auto scheduler = make_slot_scheduler<Config>(arguments_);
        while (scheduler.next(tile)) {
            typename Pipeline<Config>::Accumulators accumulators;
            pipeline_.multiply_tile(accumulators, ring, rows_of<Config::kTileK>(arguments_, tile.slot).num_steps(),
                                    consumer_idx, 0);
            run_epilogue(accumulators, tile, consumer_idx);
        }
    }

 private:
    using Ring = typename Pipeline<Config>::Ring;
    using SlotRows = SlotRowWalk<Config::kTileK>;

    static_assert(Config::kMajorA == Major::kMn && Config::kMajorB == Major::kMn && Config::kUsesCpAsync);
    static_assert(!Config::kPingPong, "the number of steps differs from tile to tile");

    // A thread copies one chunk of every 64 columns, of every sixteenth row.
    static constexpr int kRowsPerPass = kWarpgroupSize / (kSwizzleRowBytes / kChunkBytes);
    static constexpr int kNumPasses = Config::kTileK / kRowsPerPass;

    // Rows of the operands' data that this thread copies; -1 beyond the group's end.
    struct SourceRows {
        int a[kNumPasses];
        int b[kNumPasses];
    };

    __device__ bool next_step(SlotRows& rows, RowStep& step, SourceRows& sources) const {
        if (!rows.next(step)) return false;
#pragma unroll
        for (int pass = 0; pass < kNumPasses; ++pass) {
            const int row = step.row_begin + pass * kRowsPerPass + ptx::thread_idx() / 8;
            const bool is_valid = row < step.row_end;
            sources.a[pass] = is_valid ? source_row(arguments_.a, row) : -1;
            sources.b[pass] = is_valid ? source_row(arguments_.b, row) : -1;
        }
        return true;
    }

    __device__ static int source_row(const VarlenKOperand& operand, int row) {
        return operand.row_indices == nullptr ? row : operand.row_indices[row];
    }

    __device__ void load_step(const SlotTile& tile, const RowStep& step, const SourceRows& sources, int stage_idx) {
        const bool is_whole = step.row_begin + Config::kTileK <= step.row_end;
        const bool a_by_tma = is_whole && arguments_.a.row_indices == nullptr;
        const bool b_by_tma = is_whole && arguments_.b.row_indices == nullptr;
        uint64_t* full_barrier = &storage_.full_barrier[stage_idx];
        if (ptx::thread_idx() == 0)
            ptx::mbarrier_arrive_expect_bytes(full_barrier, (a_by_tma ? Pipeline<Config>::kTileBytesA : 0) +
                                                                (b_by_tma ? Pipeline<Config>::kTileBytesB : 0));
        load<Config::kTileM>(arguments_.a, storage_.a[stage_idx], full_barrier, tile.m_tile_idx * Config::kTileM, step,
                             a_by_tma, sources.a);
        load<Config::kTileN>(arguments_.b, storage_.b[stage_idx], full_barrier, tile.n_tile_idx * Config::kTileN, step,
                             b_by_tma, sources.b);
        ptx::cp_async_arrive(full_barrier);
    }

    // Columns [column, column + kWidth) of the step's rows, in blocks of 64 columns.
    template <int kWidth>
    __device__ void load(const VarlenKOperand& operand, Bf16* tile, uint64_t* full_barrier, int column,
                         const RowStep& step, bool by_tma, const int (&sources)[kNumPasses]) {
        if (by_tma && ptx::thread_idx() != 0) return;
#pragma unroll
        for (int block = 0; block < kWidth / kSwizzleRowElements; ++block) {
            Bf16* box = tile + block * Pipeline<Config>::kBlockElements;
            const int box_column = column + block * kSwizzleRowElements;
            if (by_tma)
                ptx::tma_load(box, &operand.map, full_barrier, 0, step.row_begin, box_column);
            else
                copy_rows(operand, reinterpret_cast<uint8_t*>(box), box_column, sources);
        }
    }

    __device__ void copy_rows(const VarlenKOperand& operand, uint8_t* box, int box_column,
                              const int (&sources)[kNumPasses]) {
        const int chunk_idx = ptx::thread_idx() % 8;
        const int column = box_column + chunk_idx * kChunkElements;
#pragma unroll
        for (int pass = 0; pass < kNumPasses; ++pass) {
            const int row_idx = pass * kRowsPerPass + ptx::thread_idx() / 8;
            const bool is_valid = sources[pass] >= 0 && column < operand.width;
            const Bf16* source = is_valid ? operand.data + sources[pass] * operand.stride + column : operand.data;
            ptx::cp_async_16_bytes(box + swizzled_chunk_offset(row_idx, chunk_idx), source, is_valid);
        }
    }

    __device__ void run_epilogue(const typename Pipeline<Config>::Accumulators& accumulators, const SlotTile& tile,
                                 int consumer_idx) const {
        const int slot_row = tile.slot * arguments_.a.width;
#pragma unroll
        for (int block = 0; block < Config::kRowBlocks; ++block) {
            const int row_block = consumer_idx * Config::kRowBlocks + block;
            const FragmentPosition position = fragment_position(
                slot_row + tile.m_tile_idx * Config::kTileM + first_row_of_warp(row_block),
                slot_row + arguments_.a.width, tile.n_tile_idx * Config::kTileN, tile.n_tile_idx, tile.slot);
            arguments_.epilogue.template operator()<Config::kTileN>(accumulators[block], position);
        }
    }

    const Arguments& arguments_;
    Storage& storage_;
    Pipeline<Config> pipeline_;
};

template <class Config, class Epilogue>
__global__ void __launch_bounds__(Config::kNumThreads, 1)
    varlen_k_gemm_kernel(const __grid_constant__ VarlenKArguments<Epilogue> arguments) {
    auto& storage = *reinterpret_cast<PipelineStorage<Config>*>(ptx::dynamic_shared_memory());
    VarlenKBlock<Config, Epilogue> block(arguments, storage);
    block.init_barriers();
    run_warpgroups<Config>(block);
}

}  // namespace moetrain::sm90
