#include "cpu/isa/isa.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>

#include "cpu/isa/choice.h"
#include "cpu/isa/machine.h"

namespace moetrain::isa {
namespace {

// Compiled into this build, best first.
Names find_built() {
    Names built;
#ifdef __x86_64__
    if (amx_kernels != nullptr) built.emplace_back("amx");
    if (avx512_bf16_kernels != nullptr) built.emplace_back("avx512_bf16");
    if (avx512_kernels != nullptr) built.emplace_back("avx512");
    if (avx2_kernels != nullptr) built.emplace_back("avx2");
#endif
    built.emplace_back("portable");
    if (amx_emulated_kernels != nullptr) built.emplace_back("amx_emulated");
    return built;
}

Kernels kernels_for(const std::string& isa, Dtype dtype) {
#ifdef __x86_64__
    if (isa == "amx") return amx_kernels(dtype);
    if (isa == "avx512_bf16") return avx512_bf16_kernels(dtype);
    if (isa == "avx512") return avx512_kernels(dtype);
    if (isa == "avx2") return avx2_kernels(dtype);
#endif
    return isa == "amx_emulated" ? amx_emulated_kernels(dtype) : portable_kernels(dtype);
}

Dtype dtype_named(const char* caller, const std::string& name) {
    if (name == "bfloat16") return Dtype::kBf16;
    if (name == "float16") return Dtype::kFp16;
    if (name == "float64") return Dtype::kFp64;
    TORCH_CHECK_VALUE(name == "float32", caller, ": dtype must be bfloat16, float16, float32 or float64, got ", name);
    return Dtype::kFp32;
}

}  // namespace

const Names& machine_isas() {
    static const Names found = find_isas();
    return found;
}

const Names& built_isas() {
    static const Names built = find_built();
    return built;
}

const Names& usable_isas() {
    static const Names usable = usable_of(machine_isas(), built_isas());
    return usable;
}

std::string isa_in_use() {
    const char* const wanted = std::getenv("MOETRAIN_CPU_ISA");
    if (wanted == nullptr || *wanted == '\0') return usable_isas().front();  // every call comes here
    const Choice choice = choose(wanted, machine_isas(), built_isas());
    TORCH_CHECK_VALUE(choice.refusal.empty(), choice.refusal);
    return choice.isa;
}

Kernels kernels_in_use(Dtype dtype) { return kernels_for(isa_in_use(), dtype); }

std::string kernel_isa(const std::string& dtype) {
    return kernels_in_use(dtype_named("kernel_isa", dtype)).compiled_for;
}

double gemm_ceiling(const std::string& dtype) {
    const Kernels kernels = kernels_in_use(dtype_named("gemm_ceiling", dtype));
    using Clock = std::chrono::steady_clock;
    constexpr auto kEnough = std::chrono::milliseconds(20);
    double best = 0;
    int64_t repeats = 16;
    for (int tries = 0; tries < 7;) {
        const auto begun = Clock::now();
        const auto operations = static_cast<double>(kernels.spin(repeats));
        const auto taken = Clock::now() - begun;
        if (taken < kEnough) {
            repeats *= 2;
            continue;
        }
        best = std::max(best, operations / std::chrono::duration<double>(taken).count() / 1e12);
        ++tries;
    }
    return best;
}

}  // namespace moetrain::isa
