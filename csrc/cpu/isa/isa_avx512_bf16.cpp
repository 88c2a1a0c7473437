// Kernels in bf16 for machines with AVX512_BF16; other dtypes are those of AVX-512.
#include "cpu/isa/isa.h"
#ifdef __x86_64__
#include <immintrin.h>

#pragma GCC push_options
// GCC 12's own intrinsics start from registers that they leave undefined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("arch=x86-64-v4,avx512bf16")
namespace moetrain::isa {
namespace {
constexpr const char* kInstructions = "avx512_bf16";
#include "cpu/isa/kernels.h"
// Tiles and rows of this file, in terms of the above.
#include "cpu/attention/rows_avx512.h"
#include "cpu/tiles/tile_avx512.h"
#include "cpu/tiles/tile_avx512_bf16.h"

template <int kVectors>
using Bf16Tile = Avx512Tile<uint32_t, Bf16Multiplier, RoundingToBf16, kVectors>;

}  // namespace

Kernels avx512_bf16_kernels(Dtype dtype) {
    if (dtype != Dtype::kBf16) return avx512_kernels(dtype);
    return kernels_of<Bf16Pairs, Bf16Tile<4>, Bf16Tile<2>, Avx512Rows<Bf16Pairs>>();
}

}  // namespace moetrain::isa
#pragma GCC pop_options
#endif
