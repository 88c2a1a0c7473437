// expert_mlp for machines with AVX2 and FMA.
#include "isa.h"
#ifdef __x86_64__

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace moetrain::mlp {
namespace {
#include "kernels.h"

template <typename T>
using Avx2 = VectorTile<T, 32, 6, 2>;

}  // namespace

Kernels avx2_kernels(Dtype dtype) {
    switch (dtype) {
        case Dtype::kBf16:
            return kernels_of<Singles<Bf16>, Avx2<float>>();
        case Dtype::kFp16:
            return kernels_of<Singles<Fp16>, Avx2<float>>();
        case Dtype::kFp64:
            return kernels_of<Singles<double>, Avx2<double>>();
        default:
            return kernels_of<Singles<float>, Avx2<float>>();
    }
}

}  // namespace moetrain::mlp
#pragma GCC pop_options
#endif
