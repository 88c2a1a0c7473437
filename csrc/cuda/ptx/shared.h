// Shared memory: accesses of the generic proxy that the async proxy (TMA, wgmma) is to see, and matrix loads and
// stores.
//
// The generic proxy's writes reach the async proxy through fence_async_proxy. Under emulation only the writes of this
// header (and cp.async) are followed; a tile that TMA or wgmma reads must be written by them.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx/launch.h"

namespace moetrain::ptx {

// PTX ISA, "Proxies" and "membar / fence": orders this thread's view of generic-proxy accesses to shared memory
// (stores, stmatrix, cp.async) before its later async-proxy ones (wgmma operand reads, TMA). sm_90 and later.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

struct alignas(16) Words4 {
    uint32_t word[4];
};

// "ld.shared.v4" and "st.shared.v4", at multiples of 16 bytes.
__device__ __forceinline__ Words4 load_shared_16_bytes(const void* shared) {
    Words4 value;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]), "=r"(value.word[3])
                 : "r"(shared_address(shared))
                 : "memory");
    return value;
}
__device__ __forceinline__ void store_shared_16_bytes(void* shared, const Words4& value) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(shared)), "r"(value.word[0]),
                 "r"(value.word[1]), "r"(value.word[2]), "r"(value.word[3])
                 : "memory");
}

// "st.shared.b32", at a multiple of 4 bytes: a pair of bf16.
__device__ __forceinline__ void store_shared_4_bytes(void* shared, uint32_t value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(shared_address(shared)), "r"(value) : "memory");
}

// "ldmatrix": a warp loads four 8x8 matrices of 16-bit elements. Lane 8·m + r names row r of matrix m (16 bytes at a
// multiple of 16). Lane t gets row t/4, columns 2·(t%4) and 2·(t%4) + 1 of matrix m in words[m]; with kTranspose,
// column t/4, rows 2·(t%4) and 2·(t%4) + 1. All lanes of the warp execute it.
template <bool kTranspose = false>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&words)[4], const void* row) {
    if constexpr (kTranspose)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(shared_address(row))
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "r"(shared_address(row))
                     : "memory");
}

// "stmatrix": the reverse of ldmatrix_x4. sm_90 and later.
template <bool kTranspose = false>
__device__ __forceinline__ void stmatrix_x4(void* row, const uint32_t (&words)[4]) {
    if constexpr (kTranspose)
        asm volatile(
            "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
            "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
            : "memory");
    else
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
                     "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
                     : "memory");
}

}  // namespace moetrain::ptx
