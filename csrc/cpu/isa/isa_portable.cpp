// Kernels for any machine.
#include "cpu/isa/isa.h"

namespace moetrain::isa {
namespace {
constexpr const char* kInstructions = "portable";
#include "cpu/isa/kernels.h"

template <typename T, int kColumns>
using Portable = VectorTile<T, 16, 4, 2, kColumns>;
template <typename P>
constexpr Kernels portable() {
    using Acc = typename P::Acc;
    return kernels_of<P, Portable<Acc, 64>, Portable<Acc, 32>>();
}

}  // namespace

Kernels portable_kernels(Dtype dtype) {
    switch (dtype) {
        case Dtype::kBf16:
            return portable<Singles<Bf16>>();
        case Dtype::kFp16:
            return portable<Singles<Fp16>>();
        case Dtype::kFp64:
            return portable<Singles<double>>();
        default:
            return portable<Singles<float>>();
    }
}

}  // namespace moetrain::isa
