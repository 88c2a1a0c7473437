// mma.sync: a warp multiplies bf16 fragments in registers. PTX ISA, "Warp Level Matrix Multiply-Accumulate
// Instructions: Matrix Fragments for mma.m16n8k16 with floating point type". sm_80 and later.
#pragma once

#include <cstdint>

#include "cuda/ptx/launch.h"

namespace moetrain::ptx {

// sums += A · B, A [16, 16], B [16, 8]. Of lane t, with r = t/4 and c = 2·(t%4), each word holding the element named
// and the next one along k (the lower half is the first):
//   a      (r, c), (r + 8, c), (r, c + 8), (r + 8, c + 8) as (row, k): one ldmatrix_x4 of A's four 8x8 quarters
//   b      (c, r), (c + 8, r) as (k, column)
//   sums   (r, c), (r, c + 1), (r + 8, c), (r + 8, c + 1)
__device__ __forceinline__ void mma_m16n8k16(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace moetrain::ptx
