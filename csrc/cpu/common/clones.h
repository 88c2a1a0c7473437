// Versions of a function per instruction set. No torch header.
#pragma once

// Compiles the function for AVX-512, AVX2 and the base instruction set, and picks one when the library loads.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MOETRAIN_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MOETRAIN_CLONES
#endif
// Helpers of such a function must become part of it, to be compiled for its instruction set.
#define MOETRAIN_INLINE inline __attribute__((always_inline))
