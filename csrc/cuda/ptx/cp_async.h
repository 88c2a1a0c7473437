// cp.async: each thread copies 16 bytes from global to shared memory, asynchronously, in the generic proxy.
// PTX ISA, "Data Movement and Conversion Instructions: Non-bulk copy". sm_80 and later.
#pragma once

#include <cstdint>

#include "cuda/ptx/launch.h"

namespace moetrain::ptx {

// "cp.async": copies 16 bytes, or writes 16 zero bytes when `is_valid` is false (`global` is then not read, but is
// still an address). Both addresses are multiples of 16.
__device__ __forceinline__ void cp_async_16_bytes(void* shared, const void* global, bool is_valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(is_valid ? 16 : 0)
                 : "memory");
}

// "cp.async.mbarrier.arrive": arrives on `barrier` when all earlier cp.async of this thread have landed. "noinc": the
// arrival is one of those that mbarrier_init counted.
__device__ __forceinline__ void cp_async_arrive(uint64_t* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// "cp.async.commit_group": the cp.async since the last commit become a group of this thread.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// "cp.async.wait_group": waits until at most `kNumPending` of this thread's groups are in flight. What the others wrote
// is visible to this thread alone: other threads learn of it through a barrier.
template <int kNumPending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kNumPending) : "memory");
}

}  // namespace moetrain::ptx
