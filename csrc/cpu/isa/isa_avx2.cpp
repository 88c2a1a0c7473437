// Kernels for machines with AVX2 and FMA.
#include "cpu/isa/isa.h"
#ifdef __x86_64__

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace moetrain::isa {
namespace {
constexpr const char* kInstructions = "avx2";
#include "cpu/isa/kernels.h"

template <typename P>
constexpr Kernels avx2() {
    using Acc = typename P::Acc;
    return kernels_of<P, VectorTile<Acc, 32, 6, 2>, VectorTile<Acc, 32, 6, 2, 32>>();
}

}  // namespace

Kernels avx2_kernels(Dtype dtype) {
    switch (dtype) {
        case Dtype::kBf16:
            return avx2<Singles<Bf16>>();
        case Dtype::kFp16:
            return avx2<Singles<Fp16>>();
        case Dtype::kFp64:
            return avx2<Singles<double>>();
        default:
            return avx2<Singles<float>>();
    }
}

}  // namespace moetrain::isa
#pragma GCC pop_options
#endif
