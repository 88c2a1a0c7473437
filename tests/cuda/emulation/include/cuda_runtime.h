// CUDA's built-in variables and functions for kernels under emulation, and the launch of a grid.
//
// Builds of a .cu file rewrite what is no C++: kernel<<<grid, block, shared_bytes, stream>>>(...) becomes
// launch(grid, block, shared_bytes, stream)(a function that calls the kernel, ...), and a __shared__ variable a
// reference to shared_variable<T>.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "cuda/ptx/launch.h"
#include "cuda/ptx/warp.h"
#include "cuda_qualifiers.h"
#include "cuda_runtime_api.h"

namespace moetrain::emulation {

// What a test chooses of every launch that follows.
struct LaunchSettings {
    uint64_t seed = 1;
    Timing timing = Timing::kRandom;
};
inline LaunchSettings launch_settings;

inline Shape place_in(const Shape& shape, unsigned idx) {
    return {idx % shape.x, idx / shape.x % shape.y, idx / shape.x / shape.y};
}
inline Shape grid_shape() { return current_block().options().grid_shape; }
inline Shape block_shape() { return current_block().options().block_shape; }
inline Shape thread_place() {
    return place_in(block_shape(), static_cast<unsigned>(current_block().thread().thread_idx));
}
inline Shape block_place() { return place_in(grid_shape(), static_cast<unsigned>(current_block().block_idx())); }

// The block's own copy of the __shared__ variable of that name in that function.
template <class T>
T& shared_variable(const std::string& function, const char* name) {
    return *static_cast<T*>(current_block().shared().static_variable(function + "::" + name, sizeof(T)));
}

inline auto launch(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t) {
    const GridOptions options{.num_blocks = static_cast<int>(grid.x * grid.y * grid.z),
                              .num_threads = static_cast<int>(block.x * block.y * block.z),
                              .shared_bytes = shared_bytes,
                              .seed = launch_settings.seed++,
                              .timing = launch_settings.timing,
                              .grid_shape = {grid.x, grid.y, grid.z},
                              .block_shape = {block.x, block.y, block.z}};
    return
        [options](const auto& kernel, const auto&... arguments) { run_grid(options, [&] { kernel(arguments...); }); };
}

// An atomic act lets other threads go before and after it, so that nothing around it is atomic too.
template <class T, class Act>
T act_atomically(T* target, const Act& act) {
    current_block().yield_sometimes();
    const T old = *target;
    *target = act(old);
    current_block().yield_sometimes();
    return old;
}

}  // namespace moetrain::emulation

#define threadIdx (moetrain::emulation::thread_place())
#define blockIdx (moetrain::emulation::block_place())
#define blockDim (moetrain::emulation::block_shape())
#define gridDim (moetrain::emulation::grid_shape())

inline void __syncthreads() { moetrain::ptx::sync_block(); }
// Whether any thread of the block brings a true one; a barrier as well.
inline int __syncthreads_or(int predicate) {
    int& any = moetrain::emulation::shared_variable<int>("__syncthreads_or", "any");
    __syncthreads();
    any = 0;
    __syncthreads();
    if (predicate != 0) any = 1;
    __syncthreads();
    return any;
}
inline void __syncwarp(unsigned mask = 0xFFFFFFFF) { moetrain::emulation::current_block().sync_warp(mask); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
    return moetrain::emulation::exchange_in_warp("__shfl_sync", mask, value, [=](int) { return source % 32; });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
    return moetrain::emulation::exchange_in_warp("__shfl_xor_sync", mask, value,
                                                 [=](int lane) { return lane ^ lane_mask; });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
    return moetrain::emulation::exchange_in_warp("__shfl_up_sync", mask, value,
                                                 [=](int lane) { return lane >= distance ? lane - distance : lane; });
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
    return moetrain::emulation::lanes_in_warp("__ballot_sync", mask, predicate, [](bool other, bool) { return other; });
}
inline bool __all_sync(unsigned mask, bool predicate) {
    return moetrain::emulation::lanes_in_warp("__all_sync", mask, predicate, [](bool other, bool) { return other; }) ==
           mask;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
    return moetrain::emulation::lanes_in_warp("__match_any_sync", mask, value,
                                              [](const T& other, const T& own) { return other == own; });
}

// Every lane takes the best of what all bring.
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
    return moetrain::emulation::best_in_warp("__reduce_max_sync", mask, value, [](T a, T b) { return a > b; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
    return moetrain::emulation::best_in_warp("__reduce_min_sync", mask, value, [](T a, T b) { return a < b; });
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <class T>
T atomicAdd(T* target, std::type_identity_t<T> value) {
    return moetrain::emulation::act_atomically(target, [value](T old) { return old + value; });
}
template <class T>
T atomicOr(T* target, std::type_identity_t<T> value) {
    return moetrain::emulation::act_atomically(target, [value](T old) { return old | value; });
}
template <class T>
T atomicMin(T* target, std::type_identity_t<T> value) {
    return moetrain::emulation::act_atomically(target, [value](T old) { return value < old ? value : old; });
}

template <class T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
    return a < b ? b : a;
}
