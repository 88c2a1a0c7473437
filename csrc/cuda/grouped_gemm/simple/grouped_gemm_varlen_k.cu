// Grouped GEMM, varlen-K, first version: a block owns one 64x64 tile of one slot and walks the groups that map to it in
// ascending order, gathering rows of a and b, so nothing is summed by two blocks. No host synchronisation. Compiles for
// sm_80 and later with CUDA 12 and 13.
// Gate: 72 registers; BAR LDG LDS STG STS.
#include <algorithm>

#include "cuda/grouped_gemm/simple/grouped_gemm_varlen_k.h"
#include "cuda/grouped_gemm/simple/tile.cuh"

namespace moetrain {
namespace {

constexpr int64_t kMaxGridSide = 65535;  // of gridDim.y and gridDim.z

// to[k][col] = x[row of m_begin + k, col_begin + col], zero beyond the group's end or the matrix' width.
template <typename T, typename Acc>
__device__ __forceinline__ void load_rows(const void* x, int64_t stride, const int32_t* row, int64_t width,
                                          int64_t col_begin, int64_t m_begin, int64_t m_end,
                                          Acc (&to)[kDepth][kPadded]) {
    const int col = threadIdx.x % kTile;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        const int k = threadIdx.x / kTile + i * (kThreads / kTile);
        const int64_t m = m_begin + k;
        Acc value = 0;
        if (m < m_end && col_begin + col < width) {
            const int64_t from = row == nullptr ? m : row[m];
            value = load_as<Acc>(static_cast<const T*>(x), from * stride + col_begin + col);
        }
        to[k][col] = value;
    }
}

template <typename T, typename Acc, typename Out>
__global__ void __launch_bounds__(kThreads) varlen_k_kernel(const GroupedGemmVarlenK args) {
    __shared__ Operands<Acc> operands;
    const int64_t col_begin = static_cast<int64_t>(blockIdx.x) * kTile;
    const int64_t row_begin = static_cast<int64_t>(blockIdx.y) * kTile;
    const int64_t slot = blockIdx.z;

    Acc sum[kPart][kPart] = {};
    for (int64_t group = 0; group < args.num_groups; ++group) {
        if ((args.slot == nullptr ? group : args.slot[group]) != slot) continue;
        const int64_t end = args.offset[group + 1];
        for (int64_t m = args.offset[group]; m < end; m += kDepth) {
            load_rows<T>(args.a, args.a_stride, args.row_a, args.a_width, row_begin, m, end, operands.a);
            load_rows<T>(args.b, args.b_stride, args.row_b, args.b_width, col_begin, m, end, operands.b);
            __syncthreads();
            multiply_step(operands, sum);
            __syncthreads();  // the operands are about to be overwritten
        }
    }
    Out* out = static_cast<Out*>(args.out) + slot * args.out_slot_stride;
    write_tile(sum, [&](int tile_row, int tile_col, Acc value) {
        const int64_t i = row_begin + tile_row;
        const int64_t j = col_begin + tile_col;
        if (i >= args.a_width || j >= args.b_width) return;
        const int64_t at = i * args.out_row_stride + j;
        out[at] = static_cast<Out>(args.accumulate ? load_as<Acc>(out, at) + value : value);
    });
}

template <typename T, typename Acc, typename Out>
cudaError_t launch(const GroupedGemmVarlenK& args, cudaStream_t stream) {
    const int64_t row_blocks = (args.a_width + kTile - 1) / kTile;
    if (row_blocks > kMaxGridSide || args.num_slots > kMaxGridSide) return cudaErrorInvalidValue;
    const dim3 grid(static_cast<unsigned>((args.b_width + kTile - 1) / kTile), static_cast<unsigned>(row_blocks),
                    static_cast<unsigned>(args.num_slots));
    varlen_k_kernel<T, Acc, Out><<<grid, kThreads, 0, stream>>>(args);
    return cudaGetLastError();
}

}  // namespace

cudaError_t launch_grouped_gemm_varlen_k(const GroupedGemmVarlenK& args, Element type, cudaStream_t stream) {
    if (args.num_slots == 0 || args.a_width == 0 || args.b_width == 0) return cudaSuccess;
    switch (type) {
        case Element::kBFloat16:
            return args.out_is_wide ? launch<__nv_bfloat16, float, float>(args, stream)
                                    : launch<__nv_bfloat16, float, __nv_bfloat16>(args, stream);
        case Element::kHalf:
            return args.out_is_wide ? launch<__half, float, float>(args, stream)
                                    : launch<__half, float, __half>(args, stream);
        case Element::kFloat:
            return launch<float, float, float>(args, stream);
        case Element::kDouble:
            return launch<double, double, double>(args, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace moetrain
