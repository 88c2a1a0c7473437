// Compiles the emulated tests' user of MN-major wgmma, stmatrix and TMA stores.
// Gate: 168 registers; HGMMA UTMALDG UTMASTG STSM SYNCS FENCE.
#include "../emulated/kernels/transposed_gemm.h"

namespace moetrain::test {

template <int kTileJ, int kTileK, Swizzle kSwizzle>
constexpr auto* kKernel = &transposed_gemm_kernel<TransposedGemmConfig<kTileJ, kTileK, kSwizzle>>;

extern const void* const kKernels[];
const void* const kKernels[] = {reinterpret_cast<const void*>(kKernel<128, 64, Swizzle::k128>),
                                reinterpret_cast<const void*>(kKernel<64, 32, Swizzle::k64>),
                                reinterpret_cast<const void*>(kKernel<192, 16, Swizzle::k32>)};

}  // namespace moetrain::test
