// Which instruction sets the CPU kernels of expert_mlp and causal_attention are compiled for, which of them this
// machine can run, and which one runs.
#pragma once
#include <string>
#include <vector>

#include "cpu/attention/problem.h"
#include "cpu/expert_mlp/problem.h"

namespace moetrain::isa {

struct Kernels {
    mlp::Kernels mlp;
    attention::Kernels attention;
    // Multiplies whole tiles that stay in a level 1 cache, `repeats` times; returns the operations done. What a tile
    // product reaches here is this machine's ceiling.
    int64_t (*spin)(int64_t repeats);
    // What the file that the functions above are from was compiled for; see kernels.h.
    const char* compiled_for;
};

enum class Dtype : int8_t { kBf16, kFp16, kFp32, kFp64 };

// One file each. Weak, so that a file which the build left out (MOETRAIN_BUILD_ISA) is a null pointer here.
Kernels portable_kernels(Dtype dtype);
[[gnu::weak]] Kernels amx_emulated_kernels(Dtype dtype);
#ifdef __x86_64__
[[gnu::weak]] Kernels avx2_kernels(Dtype dtype);
[[gnu::weak]] Kernels avx512_kernels(Dtype dtype);
[[gnu::weak]] Kernels avx512_bf16_kernels(Dtype dtype);
[[gnu::weak]] Kernels amx_kernels(Dtype dtype);
#endif

// Names of the sets that this machine can run, best first. "amx_emulated", which any machine can, is not among them.
const std::vector<std::string>& machine_isas();
// Names of the sets that are compiled in, best first, "amx_emulated" last.
const std::vector<std::string>& built_isas();
// Both: what the choice is made of, best first; never empty.
const std::vector<std::string>& usable_isas();
// MOETRAIN_CPU_ISA where that is set, else the best; throws if the machine or the build does not have it.
std::string isa_in_use();
// What expert_mlp and causal_attention run: the kernels of isa_in_use(), which may be those of a lesser set where the
// dtype has none of its own.
Kernels kernels_in_use(Dtype dtype);
// Their own word for what they are. dtype: bfloat16, float16, float32 or float64.
std::string kernel_isa(const std::string& dtype);
// TFLOP/s of one thread's tile products on operands that stay in its level 1 cache: the best of a few tries.
double gemm_ceiling(const std::string& dtype);

}  // namespace moetrain::isa
