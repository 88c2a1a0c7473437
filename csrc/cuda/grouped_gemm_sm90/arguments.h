// Host side of the grouped GEMM, common to the device and the emulation: from a problem to the kernel's arguments.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/grouped_gemm_sm90/kernel.h"
#include "cuda/grouped_gemm_sm90/problem.h"

namespace moetrain::sm90 {

// Throws std::invalid_argument where the kernel would be wrong. `num_a_rows` and `num_slots` are at least 1.
template <class Config, class Epilogue>
GroupedGemmArguments<Epilogue> make_arguments(const GroupedGemmProblem& problem) {
    if (Config::kGatherA != (problem.row_indices != nullptr))
        throw std::invalid_argument("grouped_gemm_sm90: row_indices must be given exactly when the config gathers A");
    if (problem.depth <= 0 || problem.depth % kChunkElements != 0)
        throw std::invalid_argument("grouped_gemm_sm90: depth must be a positive multiple of 8 (16-byte rows), got " +
                                    std::to_string(problem.depth));
    if (problem.num_columns % (2 * Epilogue::kNumColumnBlocks) != 0)
        throw std::invalid_argument("grouped_gemm_sm90: num_columns must be a multiple of " +
                                    std::to_string(2 * Epilogue::kNumColumnBlocks) + ", got " +
                                    std::to_string(problem.num_columns));
    GroupedGemmArguments<Epilogue> arguments{};
    if (!Config::kGatherA)
        arguments.a_map = ptx::make_tensor_map({.data = problem.a,
                                                .num_rows = problem.num_a_rows,
                                                .num_columns = problem.depth,
                                                .box_rows = Config::kTileM,
                                                .box_columns = Config::kTileK});
    arguments.b_map = ptx::make_tensor_map({.data = problem.b,
                                            .num_slices = problem.num_slots,
                                            .num_rows = problem.num_columns,
                                            .num_columns = problem.depth,
                                            .box_rows = Config::kTileN / Epilogue::kNumColumnBlocks,
                                            .box_columns = Config::kTileK});
    arguments.a = problem.a;
    arguments.row_indices = problem.row_indices;
    arguments.group_offsets = problem.group_offsets;
    arguments.slots = problem.slots;
    arguments.num_groups = static_cast<int>(problem.num_groups);
    arguments.num_columns = static_cast<int>(problem.num_columns);
    arguments.depth = static_cast<int>(problem.depth);
    arguments.epilogue = {problem.out, static_cast<int>(problem.num_columns / Epilogue::kNumColumnBlocks)};
    return arguments;
}

}  // namespace moetrain::sm90
