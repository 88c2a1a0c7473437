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

inline void require_aligned(const char* name, const void* address) {
    if (reinterpret_cast<uintptr_t>(address) % 16 != 0)
        throw std::invalid_argument(std::string("grouped_gemm: ") + name + " must be at a multiple of 16 bytes");
}

// A stride in elements, 0 meaning rows of `width` without gaps, as the kernels take it.
inline int row_stride_of(const char* name, int64_t stride, int64_t width) {
    const int64_t actual = stride == 0 ? width : stride;
    require_multiple(name, actual, 8);
    if (actual > INT32_MAX)
        throw std::invalid_argument(std::string("grouped_gemm: ") + name + " must be below 2^31, got " +
                                    std::to_string(actual));
    return static_cast<int>(actual);
}

inline void require_slot_lists_together(const VarlenKProblem& problem) {
    if ((problem.slot_offsets == nullptr) != (problem.slot_groups == nullptr))
        throw std::invalid_argument("grouped_gemm: slot_offsets and slot_groups must be given together");
}

}  // namespace moetrain::gemm
