// mbarrier: a counter of arrivals and of bytes in shared memory, with a phase.
// PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier".
//
// A phase completes when no arrival and no byte is outstanding. wait(parity) returns once the phase of that parity has
// completed, that is, when the current phase has the other parity: on a fresh barrier wait(1) returns at once.
#pragma once

#include <cstdint>

#include "cuda/ptx/launch.h"

namespace moetrain::ptx {

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, int num_arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(num_arrivals)
                 : "memory");
}

// "fence.mbarrier_init" and "fence.proxy.async": makes initialised barriers visible to the async proxy. Follow it with
// sync_block.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

// "mbarrier.arrive": one arrival; what this thread did before is visible to those whose wait it ends.
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// "mbarrier.arrive.expect_tx": one arrival, and `num_bytes` more to be written by TMA before the phase completes.
__device__ __forceinline__ void mbarrier_arrive_expect_bytes(uint64_t* barrier, int num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(num_bytes)
                 : "memory");
}

// "mbarrier.expect_tx": `num_bytes` more to be written by TMA before the phase completes, without an arrival.
__device__ __forceinline__ void mbarrier_expect_bytes(uint64_t* barrier, int num_bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(num_bytes)
                 : "memory");
}

// "mbarrier.try_wait.parity", repeated until it succeeds.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
        "@complete bra DONE;\n"
        "bra WAIT;\n"
        "DONE:\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

}  // namespace moetrain::ptx
