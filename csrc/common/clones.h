// Versions of a function per instruction set. No torch header.
#pragma once

// Compiles the function for AVX-512, AVX2 and the base instruction set, or those of them that the build names, and
// picks one when the library loads.
#ifndef MOETRAIN_CLONES_FOR
#define MOETRAIN_CLONES_FOR "arch=x86-64-v4", "arch=x86-64-v3", "default"
#endif
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MOETRAIN_CLONES __attribute__((target_clones(MOETRAIN_CLONES_FOR)))
#else
#define MOETRAIN_CLONES
#endif
// Helpers of such a function must become part of it, to be compiled for its instruction set.
#define MOETRAIN_INLINE inline __attribute__((always_inline))
