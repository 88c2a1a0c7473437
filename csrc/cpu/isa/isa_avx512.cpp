// Kernels for machines with AVX-512.
#include "cpu/isa/isa.h"
#ifdef __x86_64__
#include <immintrin.h>

#pragma GCC push_options
// GCC 12's own intrinsics start from registers that they leave undefined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("arch=x86-64-v4")
namespace moetrain::isa {
namespace {
constexpr const char* kInstructions = "avx512";
#include "cpu/isa/kernels.h"
// Tiles and rows of this file, in terms of the above.
#include "cpu/attention/rows_avx512.h"
#include "cpu/tiles/tile_avx512.h"

template <typename P>
constexpr Kernels floats() {
    return kernels_of<P, Avx512Tile<float, FloatMultiplier>, Avx512Tile<float, FloatMultiplier, NotRounding, 2>,
                      Avx512Rows<P>>();
}

}  // namespace

Kernels avx512_kernels(Dtype dtype) {
    switch (dtype) {
        case Dtype::kBf16:
            return floats<Singles<Bf16>>();
        case Dtype::kFp16:
            return floats<Singles<Fp16>>();
        case Dtype::kFp64:
            return kernels_of<Singles<double>, VectorTile<double, 64, 6, 4>, VectorTile<double, 64, 6, 4, 32>>();
        default:
            return floats<Singles<float>>();
    }
}

}  // namespace moetrain::isa
#pragma GCC pop_options
#endif
