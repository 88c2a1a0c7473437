// expert_mlp for machines with AVX-512.
#include "isa.h"
#ifdef __x86_64__
#include <immintrin.h>

#pragma GCC push_options
// GCC 12's own intrinsics start from registers that they leave undefined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("arch=x86-64-v4")
namespace moetrain::mlp {
namespace {
#include "kernels.h"
#include "tile_avx512.h"

using Floats = Avx512Tile<float, FloatMultiplier>;

}  // namespace

Kernels avx512_kernels(Dtype dtype) {
    switch (dtype) {
        case Dtype::kBf16:
            return kernels_of<Singles<Bf16>, Floats>();
        case Dtype::kFp16:
            return kernels_of<Singles<Fp16>, Floats>();
        case Dtype::kFp64:
            return kernels_of<Singles<double>, VectorTile<double, 64, 6, 4>>();
        default:
            return kernels_of<Singles<float>, Floats>();
    }
}

}  // namespace moetrain::mlp
#pragma GCC pop_options
#endif
