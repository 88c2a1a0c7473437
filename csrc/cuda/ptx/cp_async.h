// cp.async: each thread copies 16 bytes from global to shared memory, asynchronously, in the generic proxy.
#pragma once

#include <cstdint>

#include "cuda/ptx/launch.h"

namespace moetrain::ptx {

// Copies 16 bytes, or writes 16 zero bytes when `is_valid` is false (`global` is then not read).
__device__ __forceinline__ void cp_async_16_bytes(void* shared, const void* global, bool is_valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(is_valid ? 16 : 0)
                 : "memory");
}

// Arrives on `barrier` when all earlier cp.async of this thread have landed. "noinc": the arrival is one of those
// that mbarrier_init counted.
__device__ __forceinline__ void cp_async_arrive(uint64_t* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Orders this thread's view of generic-proxy accesses to shared memory (stores, cp.async) before its later
// async-proxy ones (wgmma operand reads, TMA).
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace moetrain::ptx
