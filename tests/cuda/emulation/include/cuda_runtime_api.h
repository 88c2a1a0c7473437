// The little of the CUDA runtime that launchers use, for kernels under emulation: a launch runs the grid before it
// returns.
#pragma once

#include <cstddef>
#include <cstring>

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = void*;

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(16) int4 {
    int x, y, z, w;
};

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

inline cudaError_t cudaMemsetAsync(void* data, int value, size_t num_bytes, cudaStream_t) {
    std::memset(data, value, num_bytes);
    return cudaSuccess;
}
