// Host side of the grouped GEMMs, common to the device and the emulation: from a problem to a kernel's arguments.
// All throw std::invalid_argument where the kernel would be wrong.
#pragma once

#include <stdexcept>

#include "cuda/grouped_gemm/checks.h"
#include "cuda/grouped_gemm/problem.h"
#include "cuda/grouped_gemm/sm90/kernel.h"
#include "cuda/grouped_gemm/sm90/varlen_k_kernel.h"

namespace moetrain::sm90 {

// `num_a_rows` and `num_slots` are at least 1.
template <class Config, class Epilogue>
GroupedGemmArguments<Epilogue> make_arguments(const GroupedGemmProblem& problem, const Epilogue& epilogue) {
    if (Config::kUsesCpAsync != (problem.row_indices != nullptr))
        throw std::invalid_argument("grouped_gemm_sm90: row_indices must be given exactly when the config gathers A");
    require_multiple("depth", problem.depth, kChunkElements);
    require_multiple("num_columns", problem.num_columns, kChunkElements * Epilogue::kNumColumnBlocks);
    const int64_t a_stride = problem.a_stride == 0 ? problem.depth : problem.a_stride;
    require_multiple("a_stride", a_stride, kChunkElements);
    GroupedGemmArguments<Epilogue> arguments{};
    if (!Config::kUsesCpAsync)
        arguments.a_map = ptx::make_tensor_map({.data = problem.a,
                                                .num_rows = problem.num_a_rows,
                                                .num_columns = problem.depth,
                                                .row_stride = a_stride,
                                                .box_rows = Config::kTileM,
                                                .box_columns = Config::kTileK});
    constexpr bool kIsMnMajor = Config::kMajorB == Major::kMn;
    arguments.b_map =
        ptx::make_tensor_map({.data = problem.b,
                              .num_slices = problem.num_slots,
                              .num_rows = kIsMnMajor ? problem.depth : problem.num_columns,
                              .num_columns = kIsMnMajor ? problem.num_columns : problem.depth,
                              .row_stride = problem.b_row_stride,
                              .slice_stride = problem.b_slot_stride,
                              .box_rows = kIsMnMajor ? Config::kTileK : Config::kTileN / Epilogue::kNumColumnBlocks,
                              .box_columns = kSwizzleRowElements});
    arguments.a = problem.a;
    arguments.a_stride = a_stride;
    arguments.row_indices = problem.row_indices;
    arguments.group_offsets = problem.group_offsets;
    arguments.slots = problem.slots;
    arguments.num_groups = static_cast<int>(problem.num_groups);
    arguments.num_columns = static_cast<int>(problem.num_columns);
    arguments.depth = static_cast<int>(problem.depth);
    arguments.epilogue = epilogue;
    return arguments;
}

// An operand without row indices comes by TMA, where a step does not cross a group's end. `num_rows` is at least 1.
inline VarlenKOperand make_varlen_k_operand(const char* name, const VarlenKProblem::Operand& operand) {
    require_multiple(name, operand.width, kChunkElements);
    const int64_t stride = operand.stride == 0 ? operand.width : operand.stride;
    require_multiple(name, stride, kChunkElements);
    VarlenKOperand made{};
    if (operand.row_indices == nullptr)
        made.map = ptx::make_tensor_map({.data = operand.data,
                                         .num_rows = operand.num_rows,
                                         .num_columns = operand.width,
                                         .row_stride = stride,
                                         .box_rows = kSwizzleRowElements,
                                         .box_columns = kSwizzleRowElements});
    made.data = operand.data;
    made.stride = stride;
    made.row_indices = operand.row_indices;
    made.width = static_cast<int>(operand.width);
    return made;
}

template <class Config, class Epilogue>
VarlenKArguments<Epilogue> make_varlen_k_arguments(const VarlenKProblem& problem, const Epilogue& epilogue) {
    require_slot_lists_together(problem);
    VarlenKArguments<Epilogue> arguments{};
    arguments.a = make_varlen_k_operand("width of a", problem.a);
    arguments.b = make_varlen_k_operand("width of b", problem.b);
    arguments.group_offsets = problem.group_offsets;
    arguments.slot_offsets = problem.slot_offsets;
    arguments.slot_groups = problem.slot_groups;
    arguments.num_slots = static_cast<int>(problem.num_slots);
    arguments.epilogue = epilogue;
    return arguments;
}

}  // namespace moetrain::sm90
