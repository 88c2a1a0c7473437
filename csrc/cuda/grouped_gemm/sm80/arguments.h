// Host side of the grouped GEMMs, common to the device and the emulation: from a problem to a kernel's arguments.
// All throw std::invalid_argument where the kernel would be wrong.
#pragma once

#include "cuda/grouped_gemm/checks.h"
#include "cuda/grouped_gemm/problem.h"
#include "cuda/grouped_gemm/sm80/kernel.h"
#include "cuda/grouped_gemm/sm80/varlen_k_kernel.h"

namespace moetrain::sm80 {

template <class Config, class Epilogue>
GroupedGemmArguments<Epilogue> make_arguments(const GroupedGemmProblem& problem, const Epilogue& epilogue) {
    constexpr bool kIsMnMajor = Config::kMajorB == Major::kMn;
    require_multiple("depth", problem.depth, kChunkElements);
    require_multiple("num_columns", problem.num_columns, kChunkElements * Epilogue::kNumColumnBlocks);
    require_aligned("a", problem.a);
    require_aligned("b", problem.b);
    const int64_t b_width = kIsMnMajor ? problem.num_columns : problem.depth;
    const int64_t b_height = kIsMnMajor ? problem.depth : problem.num_columns;
    const int b_row_stride = row_stride_of("b_row_stride", problem.b_row_stride, b_width);
    const int64_t b_slot_stride = problem.b_slot_stride == 0 ? b_height * b_row_stride : problem.b_slot_stride;
    require_multiple("b_slot_stride", b_slot_stride, kChunkElements);
    return {.a = problem.a,
            .b = problem.b,
            .b_slot_stride = b_slot_stride,
            .a_stride = row_stride_of("a_stride", problem.a_stride, problem.depth),
            .b_row_stride = b_row_stride,
            .row_indices = problem.row_indices,
            .group_offsets = problem.group_offsets,
            .slots = problem.slots,
            .num_groups = static_cast<int>(problem.num_groups),
            .num_columns = static_cast<int>(problem.num_columns),
            .depth = static_cast<int>(problem.depth),
            .epilogue = epilogue};
}

inline VarlenKOperand make_varlen_k_operand(const char* name, const VarlenKProblem::Operand& operand) {
    require_multiple(name, operand.width, kChunkElements);
    require_aligned(name, operand.data);
    return {.data = operand.data,
            .row_indices = operand.row_indices,
            .stride = row_stride_of(name, operand.stride, operand.width),
            .width = static_cast<int>(operand.width)};
}

template <class Config, class Epilogue>
VarlenKArguments<Epilogue> make_varlen_k_arguments(const VarlenKProblem& problem, const Epilogue& epilogue) {
    require_slot_lists_together(problem);
    return {.a = make_varlen_k_operand("a", problem.a),
            .b = make_varlen_k_operand("b", problem.b),
            .group_offsets = problem.group_offsets,
            .slot_offsets = problem.slot_offsets,
            .slot_groups = problem.slot_groups,
            .num_slots = static_cast<int>(problem.num_slots),
            .epilogue = epilogue};
}

}  // namespace moetrain::sm80
