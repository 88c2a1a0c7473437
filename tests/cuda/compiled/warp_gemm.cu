// Compiles the emulated tests' user of cp.async groups, ldmatrix and mma.sync.
#include "../emulated/kernels/warp_gemm.h"

namespace moetrain::test {

template __global__ void warp_gemm_kernel<false>(WarpGemmArguments);
template __global__ void warp_gemm_kernel<true>(WarpGemmArguments);

}  // namespace moetrain::test
