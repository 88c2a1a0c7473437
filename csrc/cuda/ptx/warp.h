// What the lanes of a warp tell each other. All 32 lanes execute each of these together.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx/launch.h"

namespace moetrain::ptx {

constexpr uint32_t kWholeWarp = 0xFFFFFFFF;

// The value that lane (own ^ lane_mask) has, or lane `source` has.
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int lane_mask) {
    return __shfl_xor_sync(kWholeWarp, value, lane_mask);
}
template <class T>
__device__ __forceinline__ T shuffle(T value, int source) {
    return __shfl_sync(kWholeWarp, value, source);
}

// A bit per lane, set where its predicate holds.
__device__ __forceinline__ uint32_t lanes_where(bool predicate) { return __ballot_sync(kWholeWarp, predicate); }

// Sum over groups of `kNumLanes` neighbouring lanes, the same in each; a tree, in an order that never varies.
template <int kNumLanes = 32>
__device__ __forceinline__ float sum_over_lanes(float value) {
#pragma unroll
    for (int step = kNumLanes / 2; step > 0; step /= 2)
        value += shuffle_xor(value, step);
    return value;
}

}  // namespace moetrain::ptx
