// bfloat16 for kernels under emulation.
#pragma once

#include <bit>
#include <cstdint>

#include "cuda/ptx/math.h"

struct __nv_bfloat16 {
    uint16_t bits;

    __nv_bfloat16() = default;
    __nv_bfloat16(float x) : bits(static_cast<uint16_t>(moetrain::ptx::bf16_bits(x))) {}
    operator float() const { return std::bit_cast<float>(uint32_t{bits} << 16); }
};
