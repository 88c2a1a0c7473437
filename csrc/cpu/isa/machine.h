// Which instruction sets this machine can run. No torch header: the build asks too, before anything is compiled.
#pragma once
#include <string>
#include <vector>
#ifdef __x86_64__
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moetrain::isa {

#ifdef __x86_64__
// AMX's state is large, so Linux gives it to processes that ask (Documentation/arch/x86/xstate.rst).
inline bool has_amx() {
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

// Best first; "portable" always closes the list.
inline std::vector<std::string> find_isas() {
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

}  // namespace moetrain::isa
