// Stand-in for torch's: the operators' CUDA side runs on the host, over the emulation.
#pragma once
#include <c10/util/Exception.h>

#include "cuda_runtime_api.h"

#define C10_CUDA_CHECK(call) TORCH_CHECK((call) == cudaSuccess, #call)

enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrMultiProcessorCount };

// A Hopper GPU of three multiprocessors.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 3;
    return cudaSuccess;
}
