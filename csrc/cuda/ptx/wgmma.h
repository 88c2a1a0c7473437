// wgmma: a warpgroup (4 consecutive warps, the first a multiple of 4) multiplies two bf16 tiles that lie in shared
// memory and accumulates in fp32 registers. PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate
// Instructions".
//
// Order of use: wgmma_fence, any number of wgmma, wgmma_commit, wgmma_wait. Accumulators and operand tiles belong to
// the hardware from the first wgmma to the wait that retires it. All threads of the warpgroup execute each of them.
#pragma once

#include <cstdint>

#include "cuda/common/matrix_descriptor.h"
#include "cuda/ptx/launch.h"

namespace moetrain::ptx {

// "wgmma.fence": orders earlier accesses to the accumulators before the wgmma that follow. Needed before the first
// wgmma and whenever the thread has touched accumulators since.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// "wgmma.commit_group": the wgmma since the last commit become a group.
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// "wgmma.wait_group": waits until at most `kNumPending` committed groups are in flight. Naming the accumulators keeps
// the compiler from moving their uses across the wait.
template <int kNumPending, int kSize>
__device__ __forceinline__ void wgmma_wait(float (&accumulators)[kSize]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kNumPending) : "memory");
#pragma unroll
    for (int i = 0; i < kSize; ++i)
        asm volatile("" : "+f"(accumulators[i])::"memory");
}

// "wgmma.mma_async": accumulators = A · Bᵀ + (accumulate ? accumulators : 0), A [64, 16] and B [kTileN, 16]. An operand
// is K-major (K contiguous) or MN-major (M or N contiguous), as its descriptor says too. Thread t of the warpgroup
// holds D[16·(t/32) + (t%32)/4 + 8·(i/2 % 2)][8·(i/4) + 2·(t%4) + i%2] in accumulators[i]
// ("Register Fragments and Shared Memory Matrix Layouts", accumulator D). kTileN: 32, 64, 96, 128, 160, 192, 224, 256.
template <int kTileN, Major kMajorA = Major::kK, Major kMajorB = Major::kK>
__device__ __forceinline__ void wgmma(float (&accumulators)[kTileN / 2], uint64_t a_descriptor, uint64_t b_descriptor,
                                      bool accumulate);

// clang-format off
// Names of ten registers whose numbers share the leading digits, and of the first few.
#define MOETRAIN_TWO(tens) "%" tens "0, %" tens "1"
#define MOETRAIN_FOUR(tens) MOETRAIN_TWO(tens) ", %" tens "2, %" tens "3"
#define MOETRAIN_SIX(tens) MOETRAIN_FOUR(tens) ", %" tens "4, %" tens "5"
#define MOETRAIN_EIGHT(tens) MOETRAIN_SIX(tens) ", %" tens "6, %" tens "7"
#define MOETRAIN_TEN(tens) MOETRAIN_EIGHT(tens) ", %" tens "8, %" tens "9, "
#define MOETRAIN_REGISTERS_16 MOETRAIN_TEN("") MOETRAIN_SIX("1")
#define MOETRAIN_REGISTERS_30 MOETRAIN_TEN("") MOETRAIN_TEN("1") MOETRAIN_TEN("2")
#define MOETRAIN_REGISTERS_32 MOETRAIN_REGISTERS_30 MOETRAIN_TWO("3")
#define MOETRAIN_REGISTERS_40 MOETRAIN_REGISTERS_30 MOETRAIN_TEN("3")
#define MOETRAIN_REGISTERS_48 MOETRAIN_REGISTERS_40 MOETRAIN_EIGHT("4")
#define MOETRAIN_REGISTERS_60 MOETRAIN_REGISTERS_40 MOETRAIN_TEN("4") MOETRAIN_TEN("5")
#define MOETRAIN_REGISTERS_64 MOETRAIN_REGISTERS_60 MOETRAIN_FOUR("6")
#define MOETRAIN_REGISTERS_80_AND_ON MOETRAIN_REGISTERS_60 MOETRAIN_TEN("6") MOETRAIN_TEN("7")
#define MOETRAIN_REGISTERS_80 \
    MOETRAIN_REGISTERS_60 MOETRAIN_TEN("6") MOETRAIN_EIGHT("7") ", %78, %79"
#define MOETRAIN_REGISTERS_96 MOETRAIN_REGISTERS_80_AND_ON MOETRAIN_TEN("8") MOETRAIN_SIX("9")
#define MOETRAIN_REGISTERS_110 \
    MOETRAIN_REGISTERS_80_AND_ON MOETRAIN_TEN("8") MOETRAIN_TEN("9") MOETRAIN_TEN("10")
#define MOETRAIN_REGISTERS_112 MOETRAIN_REGISTERS_110 MOETRAIN_TWO("11")
#define MOETRAIN_REGISTERS_128 MOETRAIN_REGISTERS_110 MOETRAIN_TEN("11") MOETRAIN_EIGHT("12")

#define MOETRAIN_ACCUMULATORS_8(i)                                                                          \
    "+f"(accumulators[i]), "+f"(accumulators[i + 1]), "+f"(accumulators[i + 2]), "+f"(accumulators[i + 3]), \
    "+f"(accumulators[i + 4]), "+f"(accumulators[i + 5]), "+f"(accumulators[i + 6]), "+f"(accumulators[i + 7])
#define MOETRAIN_ACCUMULATORS_16(i) MOETRAIN_ACCUMULATORS_8(i), MOETRAIN_ACCUMULATORS_8(i + 8)
#define MOETRAIN_ACCUMULATORS_32(i) MOETRAIN_ACCUMULATORS_16(i), MOETRAIN_ACCUMULATORS_16(i + 16)
#define MOETRAIN_ACCUMULATORS_64(i) MOETRAIN_ACCUMULATORS_32(i), MOETRAIN_ACCUMULATORS_32(i + 32)

// kTileN, the names of the accumulator registers, the numbers of the five operands after them, the registers
#define MOETRAIN_DEFINE_WGMMA(N, REGISTER_NAMES, A, B, ACCUMULATE, TRANSPOSE_A, TRANSPOSE_B, ...)             \
    template <Major kMajorA, Major kMajorB>                                                                   \
    struct Wgmma<N, kMajorA, kMajorB> {                                                                       \
        static __device__ __forceinline__ void issue(float (&accumulators)[N / 2], uint64_t a_descriptor,     \
                                                     uint64_t b_descriptor, bool accumulate) {                \
            asm volatile(                                                                                     \
                "{\n"                                                                                         \
                ".reg .pred accumulate;\n"                                                                    \
                "setp.ne.b32 accumulate, %" ACCUMULATE ", 0;\n"                                               \
                "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" REGISTER_NAMES "}, %" A ", %" B  \
                ", accumulate, 1, 1, %" TRANSPOSE_A ", %" TRANSPOSE_B ";\n"                                   \
                "}"                                                                                           \
                : __VA_ARGS__                                                                                 \
                : "l"(a_descriptor), "l"(b_descriptor), "r"(static_cast<int>(accumulate)),                    \
                  "n"(kMajorA == Major::kMn ? 1 : 0), "n"(kMajorB == Major::kMn ? 1 : 0));                    \
        }                                                                                                     \
    };

template <int kTileN, Major kMajorA, Major kMajorB>
struct Wgmma;

MOETRAIN_DEFINE_WGMMA(32, MOETRAIN_REGISTERS_16, "16", "17", "18", "19", "20", MOETRAIN_ACCUMULATORS_16(0))
MOETRAIN_DEFINE_WGMMA(64, MOETRAIN_REGISTERS_32, "32", "33", "34", "35", "36", MOETRAIN_ACCUMULATORS_32(0))
MOETRAIN_DEFINE_WGMMA(96, MOETRAIN_REGISTERS_48, "48", "49", "50", "51", "52",
                      MOETRAIN_ACCUMULATORS_32(0), MOETRAIN_ACCUMULATORS_16(32))
MOETRAIN_DEFINE_WGMMA(128, MOETRAIN_REGISTERS_64, "64", "65", "66", "67", "68", MOETRAIN_ACCUMULATORS_64(0))
MOETRAIN_DEFINE_WGMMA(160, MOETRAIN_REGISTERS_80, "80", "81", "82", "83", "84",
                      MOETRAIN_ACCUMULATORS_64(0), MOETRAIN_ACCUMULATORS_16(64))
MOETRAIN_DEFINE_WGMMA(192, MOETRAIN_REGISTERS_96, "96", "97", "98", "99", "100",
                      MOETRAIN_ACCUMULATORS_64(0), MOETRAIN_ACCUMULATORS_32(64))
MOETRAIN_DEFINE_WGMMA(224, MOETRAIN_REGISTERS_112, "112", "113", "114", "115", "116",
                      MOETRAIN_ACCUMULATORS_64(0), MOETRAIN_ACCUMULATORS_32(64), MOETRAIN_ACCUMULATORS_16(96))
MOETRAIN_DEFINE_WGMMA(256, MOETRAIN_REGISTERS_128, "128", "129", "130", "131", "132",
                      MOETRAIN_ACCUMULATORS_64(0), MOETRAIN_ACCUMULATORS_64(64))

#undef MOETRAIN_DEFINE_WGMMA
#undef MOETRAIN_TWO
#undef MOETRAIN_FOUR
#undef MOETRAIN_SIX
#undef MOETRAIN_EIGHT
#undef MOETRAIN_TEN
#undef MOETRAIN_REGISTERS_16
#undef MOETRAIN_REGISTERS_30
#undef MOETRAIN_REGISTERS_32
#undef MOETRAIN_REGISTERS_40
#undef MOETRAIN_REGISTERS_48
#undef MOETRAIN_REGISTERS_60
#undef MOETRAIN_REGISTERS_64
#undef MOETRAIN_REGISTERS_80
#undef MOETRAIN_REGISTERS_80_AND_ON
#undef MOETRAIN_REGISTERS_96
#undef MOETRAIN_REGISTERS_110
#undef MOETRAIN_REGISTERS_112
#undef MOETRAIN_REGISTERS_128
#undef MOETRAIN_ACCUMULATORS_8
#undef MOETRAIN_ACCUMULATORS_16
#undef MOETRAIN_ACCUMULATORS_32
#undef MOETRAIN_ACCUMULATORS_64
// clang-format on

template <int kTileN, Major kMajorA, Major kMajorB>
__device__ __forceinline__ void wgmma(float (&accumulators)[kTileN / 2], uint64_t a_descriptor, uint64_t b_descriptor,
                                      bool accumulate) {
    Wgmma<kTileN, kMajorA, kMajorB>::issue(accumulators, a_descriptor, b_descriptor, accumulate);
}

}  // namespace moetrain::ptx
