#include "isa.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#ifdef __x86_64__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moetrain::isa {
namespace {

#ifdef __x86_64__
// AMX's state is large, so Linux gives it to processes that ask (Documentation/arch/x86/xstate.rst).
bool has_amx() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
    constexpr unsigned kAmxBf16 = 1U << 22, kAmxTile = 1U << 24;
    if ((edx & kAmxBf16) == 0 || (edx & kAmxTile) == 0) return false;
#ifdef __linux__
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
#endif

std::vector<std::string> find_isas() {
    std::vector<std::string> found;
#ifdef __x86_64__
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512cd");
    const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
    if (bf16 && has_amx()) found.emplace_back("amx");
    if (bf16) found.emplace_back("avx512_bf16");
    if (avx512) found.emplace_back("avx512");
    if (avx2) found.emplace_back("avx2");
#endif
    found.emplace_back("portable");
    return found;
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

const std::vector<std::string>& machine_isas() {
    static const std::vector<std::string> found = find_isas();
    return found;
}

std::string isa_in_use() {
    const char* const wanted = std::getenv("MOETRAIN_CPU_ISA");
    const auto& has = machine_isas();
    if (wanted == nullptr || *wanted == '\0') return has.front();
    const std::string name = wanted;
    if (name == "amx_emulated" || std::find(has.begin(), has.end(), name) != has.end()) return name;
    std::string list = has.front();
    for (size_t i = 1; i < has.size(); ++i)
        list += ", " + has[i];
    TORCH_CHECK_VALUE(false, "moetrain: MOETRAIN_CPU_ISA must be one of ", list,
                      " (what this machine has) or amx_emulated, got ", name, "; unset it to use the best");
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
