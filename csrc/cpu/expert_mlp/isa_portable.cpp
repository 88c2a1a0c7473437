// expert_mlp for any machine, and its AMX source on emulated tile registers.
#include "isa.h"

namespace moetrain::mlp {
namespace {
#include "kernels.h"
#include "tile_amx.h"

template <typename T>
using Portable = VectorTile<T, 16, 4, 2>;

}  // namespace

Kernels portable_kernels(Dtype dtype) {
    switch (dtype) {
        case Dtype::kBf16:
            return kernels_of<Singles<Bf16>, Portable<float>>();
        case Dtype::kFp16:
            return kernels_of<Singles<Fp16>, Portable<float>>();
        case Dtype::kFp64:
            return kernels_of<Singles<double>, Portable<double>>();
        default:
            return kernels_of<Singles<float>, Portable<float>>();
    }
}

Kernels amx_emulated_kernels(Dtype dtype) {
    if (dtype != Dtype::kBf16) return portable_kernels(dtype);
    return kernels_of<Bf16Pairs, AmxTile<EmulatedAmx, Untransposing>>();
}

}  // namespace moetrain::mlp
