// wgmma: a warpgroup multiplies two bf16 tiles that lie in shared memory and accumulates in fp32 registers.
//
// Order of use: wgmma_fence, any number of wgmma, wgmma_commit, wgmma_wait. Accumulators and operand tiles belong to
// the hardware from the first wgmma to the wait that retires it.
#pragma once

#include <cstdint>

#include "cuda/ptx/launch.h"

namespace moetrain::ptx {

// Orders earlier register accesses before the wgmma that follow.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `kNumPending` committed groups are in flight. Naming the accumulators keeps the compiler from
// moving their uses across the wait.
template <int kNumPending, int kSize>
__device__ __forceinline__ void wgmma_wait(float (&accumulators)[kSize]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kNumPending) : "memory");
#pragma unroll
    for (int i = 0; i < kSize; ++i)
        asm volatile("" : "+f"(accumulators[i])::"memory");
}

// accumulators = A · Bᵀ + (accumulate ? accumulators : 0), A [64, 16] and B [kTileN, 16] both K-major.
// Thread t of the warpgroup holds D[16·(t/32) + (t%32)/4 + 8·(i/2 % 2)][8·(i/4) + 2·(t%4) + i%2] in accumulators[i].
template <int kTileN>
__device__ __forceinline__ void wgmma(float (&accumulators)[kTileN / 2], uint64_t a_descriptor, uint64_t b_descriptor,
                                      bool accumulate);

// clang-format off
#define MOETRAIN_ACCUMULATORS_8(i)                                                                          \
    "+f"(accumulators[i]), "+f"(accumulators[i + 1]), "+f"(accumulators[i + 2]), "+f"(accumulators[i + 3]), \
    "+f"(accumulators[i + 4]), "+f"(accumulators[i + 5]), "+f"(accumulators[i + 6]), "+f"(accumulators[i + 7])
#define MOETRAIN_ACCUMULATORS_32(i)                             \
    MOETRAIN_ACCUMULATORS_8(i), MOETRAIN_ACCUMULATORS_8(i + 8), \
    MOETRAIN_ACCUMULATORS_8(i + 16), MOETRAIN_ACCUMULATORS_8(i + 24)

// kTileN, the names of the accumulator registers, the numbers of the three operands after them, the registers
#define MOETRAIN_DEFINE_WGMMA(N, REGISTER_NAMES, A, B, ACCUMULATE, ...)                                       \
    template <>                                                                                               \
    __device__ __forceinline__ void wgmma<N>(float (&accumulators)[N / 2], uint64_t a_descriptor,             \
                                             uint64_t b_descriptor, bool accumulate) {                        \
        asm volatile(                                                                                         \
            "{\n"                                                                                             \
            ".reg .pred accumulate;\n"                                                                        \
            "setp.ne.b32 accumulate, " ACCUMULATE ", 0;\n"                                                    \
            "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGISTER_NAMES "}, " A ", " B        \
            ", accumulate, 1, 1, 0, 0;\n"                                                                     \
            "}"                                                                                               \
            : __VA_ARGS__                                                                                     \
            : "l"(a_descriptor), "l"(b_descriptor), "r"(static_cast<int>(accumulate)));                       \
    }

#define MOETRAIN_REGISTERS_32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define MOETRAIN_REGISTERS_64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MOETRAIN_REGISTERS_128 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

MOETRAIN_DEFINE_WGMMA(64, MOETRAIN_REGISTERS_32, "%32", "%33", "%34",
                      MOETRAIN_ACCUMULATORS_32(0))
MOETRAIN_DEFINE_WGMMA(128, MOETRAIN_REGISTERS_64, "%64", "%65", "%66",
                      MOETRAIN_ACCUMULATORS_32(0), MOETRAIN_ACCUMULATORS_32(32))
MOETRAIN_DEFINE_WGMMA(256, MOETRAIN_REGISTERS_128, "%128", "%129", "%130",
                      MOETRAIN_ACCUMULATORS_32(0), MOETRAIN_ACCUMULATORS_32(32),
                      MOETRAIN_ACCUMULATORS_32(64), MOETRAIN_ACCUMULATORS_32(96))

#undef MOETRAIN_DEFINE_WGMMA
#undef MOETRAIN_ACCUMULATORS_8
#undef MOETRAIN_ACCUMULATORS_32
#undef MOETRAIN_REGISTERS_32
#undef MOETRAIN_REGISTERS_64
#undef MOETRAIN_REGISTERS_128
// clang-format on

}  // namespace moetrain::ptx
