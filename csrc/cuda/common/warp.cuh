// What a warp does together, and loads in the arithmetic's type. For .cu files only.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace moetrain {

constexpr int kWarpSize = 32;
constexpr unsigned kWholeWarp = 0xffffffffU;
constexpr int64_t kMaxSharedBytes = 48 << 10;  // what a block may have without asking for more
#ifndef MOETRAIN_MAX_BLOCKS
#define MOETRAIN_MAX_BLOCKS (1 << 16)  // emulated tests set a few, so that small sizes take several steps of a grid
#endif
constexpr int64_t kMaxBlocks = MOETRAIN_MAX_BLOCKS;  // grid-stride beyond this

template <typename Acc, typename T>
__device__ __forceinline__ Acc load_as(const T* x, int64_t i) {
    if constexpr (sizeof(T) == 2) {
        return static_cast<Acc>(static_cast<float>(x[i]));
    } else {
        return static_cast<Acc>(x[i]);
    }
}

// Trees of shuffles: every lane gets the same result, in an order that never varies.
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
    for (int step = kWarpSize / 2; step > 0; step /= 2)
        x += __shfl_xor_sync(kWholeWarp, x, step);
    return x;
}

template <typename T>
__device__ __forceinline__ T warp_max(T x) {
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
        const T other = __shfl_xor_sync(kWholeWarp, x, step);
        x = other > x ? other : x;
    }
    return x;
}

template <typename T>
__device__ __forceinline__ T warp_min(T x) {
    for (int step = kWarpSize / 2; step > 0; step /= 2) {
        const T other = __shfl_xor_sync(kWholeWarp, x, step);
        x = other < x ? other : x;
    }
    return x;
}

}  // namespace moetrain
