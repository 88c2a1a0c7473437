// expert_mlp in bf16 for machines with AVX512_BF16, and for machines with AMX; other dtypes are those of AVX-512.
#include "isa.h"
#ifdef __x86_64__
#include <immintrin.h>

#pragma GCC push_options
// GCC 12's own intrinsics start from registers that they leave undefined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("arch=x86-64-v4,avx512bf16")
namespace moetrain::mlp {
namespace {
#include "kernels.h"
#include "tile_amx.h"
#include "tile_avx512.h"
#include "tile_avx512_bf16.h"

struct Packing : Transposing, RoundingToBf16 {};

}  // namespace

Kernels avx512_bf16_kernels(Dtype dtype) {
    if (dtype != Dtype::kBf16) return avx512_kernels(dtype);
    return kernels_of<Bf16Pairs, Avx512Tile<uint32_t, Bf16Multiplier, RoundingToBf16>>();
}

Kernels amx_kernels(Dtype dtype) {
    if (dtype != Dtype::kBf16) return avx512_kernels(dtype);
    return kernels_of<Bf16Pairs, AmxTile<MachineAmx, Packing>>();
}

}  // namespace moetrain::mlp
#pragma GCC pop_options
#endif
