// Grouped GEMM, varlen-M, first version: a block finds its group from the offsets on the device, gathers its rows of a
// and multiplies one 64x64 tile. No host synchronisation. Compiles for sm_80 and later with CUDA 12 and 13.
// Gate: 96 registers; BAR LDG LDS STG STS SHFL.
#include <algorithm>

#include "cuda/grouped_gemm/simple/grouped_gemm.h"
#include "cuda/grouped_gemm/simple/tile.cuh"

namespace moetrain {
namespace {

constexpr int64_t kMaxColumnBlocks = 65535;  // of gridDim.y

struct RowTile {
    int64_t group, begin, end;  // rows [begin, end) of c; group < 0 where there are fewer tiles than blocks
};

// The tile_idx-th tile when every group is cut into tiles of kTile rows. Called by one whole warp.
__device__ __forceinline__ RowTile find_row_tile(const int32_t* offset, int64_t num_groups, int64_t tile_idx) {
    const int lane = threadIdx.x % kWarpSize;
    int64_t tiles_before = 0;
    for (int64_t base = 0; base < num_groups; base += kWarpSize) {
        const int64_t group = base + lane;
        const int64_t begin = group < num_groups ? offset[group] : 0;
        const int64_t end = group < num_groups ? offset[group + 1] : 0;
        const int64_t tiles = (end - begin + kTile - 1) / kTile;
        int64_t through = tiles;  // tiles of this chunk's groups up to this lane's
        for (int step = 1; step < kWarpSize; step *= 2) {
            const int64_t below = __shfl_up_sync(kWholeWarp, through, step);
            if (lane >= step) through += below;
        }
        const int64_t first = tiles_before + through - tiles;
        const unsigned owner = __ballot_sync(kWholeWarp, tile_idx >= first && tile_idx < first + tiles);
        if (owner != 0) {
            const int source = __ffs(static_cast<int>(owner)) - 1;
            const int64_t tile_begin = begin + (tile_idx - first) * kTile;
            const int64_t tile_end = tile_begin + kTile < end ? tile_begin + kTile : end;
            return {base + source, __shfl_sync(kWholeWarp, tile_begin, source),
                    __shfl_sync(kWholeWarp, tile_end, source)};
        }
        tiles_before += __shfl_sync(kWholeWarp, through, kWarpSize - 1);
    }
    return {-1, 0, 0};
}

template <typename T, typename Acc>
__device__ __forceinline__ void load_a(const GroupedGemm& args, const int64_t (&row)[kLoads], int64_t depth_begin,
                                       Operands<Acc>& to) {
    const int k = threadIdx.x % kDepth;
    const bool inside = depth_begin + k < args.inner;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        const bool valid = inside && row[i] >= 0;
        to.a[k][threadIdx.x / kDepth + i * (kThreads / kDepth)] =
            valid ? load_as<Acc>(static_cast<const T*>(args.a), row[i] * args.a_stride + depth_begin + k) : Acc(0);
    }
}

template <typename T, typename Acc, bool kIsKN>
__device__ __forceinline__ void load_b(const GroupedGemm& args, const T* b, int64_t col_begin, int64_t depth_begin,
                                       Operands<Acc>& to) {
    constexpr int kInnermost = kIsKN ? kTile : kDepth;  // neighbouring threads read neighbouring elements
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        const int fast = threadIdx.x % kInnermost;
        const int slow = threadIdx.x / kInnermost + i * (kThreads / kInnermost);
        const int k = kIsKN ? slow : fast;
        const int col = kIsKN ? fast : slow;
        const bool valid = depth_begin + k < args.inner && col_begin + col < args.cols;
        const int64_t at = kIsKN ? (depth_begin + k) * args.b_row_stride + col_begin + col
                                 : (col_begin + col) * args.b_row_stride + depth_begin + k;
        to.b[k][col] = valid ? load_as<Acc>(b, at) : Acc(0);
    }
}

template <typename T, typename Acc, bool kIsKN>
__global__ void __launch_bounds__(kThreads) grouped_gemm_kernel(const GroupedGemm args) {
    __shared__ Operands<Acc> operands;
    __shared__ RowTile shared_tile;
    if (threadIdx.x < kWarpSize) {
        const RowTile found = find_row_tile(args.offset, args.num_groups, blockIdx.x);
        if (threadIdx.x == 0) shared_tile = found;
    }
    __syncthreads();
    const RowTile tile = shared_tile;
    if (tile.group < 0) return;

    int64_t row[kLoads];  // of a, for the rows of the tile that this thread loads; -1 beyond the tile's end
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        const int64_t m = tile.begin + threadIdx.x / kDepth + i * (kThreads / kDepth);
        row[i] = m >= tile.end ? -1 : args.row == nullptr ? m : args.row[m];
    }
    const int64_t slot = args.slot == nullptr ? tile.group : args.slot[tile.group];
    const T* b = static_cast<const T*>(args.b) + slot * args.b_slot_stride;
    const int64_t col_begin = static_cast<int64_t>(blockIdx.y) * kTile;

    Acc sum[kPart][kPart] = {};
    for (int64_t depth_begin = 0; depth_begin < args.inner; depth_begin += kDepth) {
        load_a<T>(args, row, depth_begin, operands);
        load_b<T, Acc, kIsKN>(args, b, col_begin, depth_begin, operands);
        __syncthreads();
        multiply_step(operands, sum);
        __syncthreads();  // the operands are about to be overwritten
    }
    T* c = static_cast<T*>(args.c);
    write_tile(sum, [&](int tile_row, int tile_col, Acc value) {
        const int64_t m = tile.begin + tile_row;
        const int64_t n = col_begin + tile_col;
        if (m < tile.end && n < args.cols) c[m * args.cols + n] = static_cast<T>(value);
    });
}

template <typename T, typename Acc>
cudaError_t launch(const GroupedGemm& args, cudaStream_t stream) {
    const int64_t column_blocks = (args.cols + kTile - 1) / kTile;
    if (column_blocks > kMaxColumnBlocks) return cudaErrorInvalidValue;
    // Every group may end in a part of a tile; blocks beyond the tiles there are find none and leave.
    const dim3 grid(static_cast<unsigned>(args.capacity / kTile + args.num_groups),
                    static_cast<unsigned>(column_blocks));
    if (args.b_is_kn) {
        grouped_gemm_kernel<T, Acc, true><<<grid, kThreads, 0, stream>>>(args);
    } else {
        grouped_gemm_kernel<T, Acc, false><<<grid, kThreads, 0, stream>>>(args);
    }
    return cudaGetLastError();
}

}  // namespace

cudaError_t launch_grouped_gemm(const GroupedGemm& args, Element type, cudaStream_t stream) {
    if (args.capacity == 0 || args.num_groups == 0 || args.cols == 0) return cudaSuccess;
    switch (type) {
        case Element::kBFloat16:
            return launch<__nv_bfloat16, float>(args, stream);
        case Element::kHalf:
            return launch<__half, float>(args, stream);
        case Element::kFloat:
            return launch<float, float>(args, stream);
        case Element::kDouble:
            return launch<double, double>(args, stream);
    }
    return cudaErrorInvalidValue;
}

}  // namespace moetrain
