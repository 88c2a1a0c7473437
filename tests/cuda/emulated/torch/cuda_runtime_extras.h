// What launchers of Hopper's kernels use of the CUDA runtime besides the emulation's own.
#pragma once
#include "cuda_runtime.h"

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int num_bytes) {
    return num_bytes <= 227 * 1024 ? cudaSuccess : cudaErrorInvalidValue;
}
