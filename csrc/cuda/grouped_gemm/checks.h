// What every architecture's grouped GEMM demands of a problem, on the host. All throw std::invalid_argument.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/grouped_gemm/problem.h"

namespace moetrain::gemm {

inline void require_multiple(const char* name, int64_t value, int64_t divisor) {
    if (value > 0 && value % divisor == 0) return;
    throw std::invalid_argument(std::string("grouped_gemm: ") + name + " must be a positive multiple of " +
                                std::to_string(divisor) + " (16-byte rows), got " + std::to_string(value));
}

inline void require_slot_lists_together(const VarlenKProblem& problem) {
    if ((problem.slot_offsets == nullptr) != (problem.slot_groups == nullptr))
        throw std::invalid_argument("grouped_gemm: slot_offsets and slot_groups must be given together");
}

}  // namespace moetrain::gemm
