// Token-choice selection: a warp per token chooses and weighs; then sums of probabilities over tokens, in an order
// that depends on sizes alone, in float64. Keys are integers ordered like the scores, so choices equal the CPU's
// wherever no bias is added. Compiled for sm_80 and sm_90a.
// Gate: 56 registers; LDG STG.
#include <algorithm>

#include "cuda/routing/select_experts.h"
#include "cuda/routing/select_experts_row.cuh"

namespace moetrain {
namespace {

constexpr int kMaxWarps = 4;       // tokens in flight per block
constexpr int kSumRows = 8;        // tokens that a block of the sum looks at side by side
constexpr int64_t kMaxSlabs = 64;  // runs of tokens summed apart

int64_t num_slabs_of(const SelectOptions& o) { return std::clamp<int64_t>(kMaxSlabs / o.num_segments, 1, kMaxSlabs); }

template <typename Acc>
__device__ __forceinline__ void write_choice(const SelectOptions& o, const RowStats<Acc>& stats, int64_t t,
                                             int32_t segment, int lane, const WarpRow<Acc>& row,
                                             const SelectForwardCuda<Acc>& io) {
    const WeightStats<Acc> chosen = weight_stats(o, stats, row.logit, row.id, lane);
    for (int k = lane; k < o.top_k; k += kWarpSize) {
        const int32_t raw_id = row.id[k];
        const bool real = raw_id < o.num_true();
        const Acc weight = real ? raw_weight(o, stats, chosen, row.logit[raw_id]) * chosen.inverse : Acc(0);
        io.expert_id_TK[t * o.top_k + k] = real ? raw_id : -1;
        io.weight_TK[t * o.top_k + k] = weight * static_cast<Acc>(o.scale);
        atomicAdd(reinterpret_cast<unsigned long long*>(io.count_GE + segment * o.num_experts + raw_id), 1ULL);
    }
}

// A valid token's segment, or -1 where it is out of range.
template <typename Acc>
__device__ __forceinline__ int32_t segment_of(const SelectOptions& o, int64_t t, int lane,
                                              const SelectForwardCuda<Acc>& io) {
    if (io.segment_T == nullptr) return 0;
    const int32_t segment = io.segment_T[t];
    if (segment >= 0 && segment < o.num_segments) return segment;
    if (io.breach != nullptr && lane == 0) {
        atomicMin(reinterpret_cast<unsigned long long*>(io.breach), static_cast<unsigned long long>(t));
    }
    return -1;
}

template <typename Acc, typename T>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize)
    select_kernel(const SelectOptions o, const SelectForwardCuda<Acc> io, int64_t warp_bytes) {
    extern __shared__ __align__(16) char memory[];
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    const int64_t num_warps = blockDim.x / kWarpSize;
    const WarpRow<Acc> row = warp_row<Acc>(memory + warp * warp_bytes, o);
    for (int64_t t = blockIdx.x * num_warps + warp; t < o.num_tokens; t += gridDim.x * num_warps) {
        int32_t segment = io.valid_T == nullptr || io.valid_T[t] ? segment_of(o, t, lane, io) : -1;
        RowStats<Acc> stats{0, 0};
        if (segment >= 0) {
            bool finite =
                load_logits(static_cast<const T*>(io.logits_TE) + t * io.row_stride, o.num_experts, lane, row.logit);
            if (finite) {
                stats = row_stats(o, row.logit, lane);
                finite = fill_keys(o, stats, io.bias_E, lane, row);
            }
            if (!finite) {
                if (lane == 0) *io.bad_1 = 1;
                segment = -1;
            }
        }
        if (segment >= 0) {
            if (o.groups_kept < o.num_groups) mask_groups(o, stats, io.bias_E, lane, row);
            for (int k = 0; k < o.top_k; ++k) {
                const int place = take_largest(row.key, o.num_experts, OrderedKey<Acc>::kTaken, lane);
                if (lane == 0) row.id[k] = place;
            }
            __syncwarp();
            write_choice(o, stats, t, segment, lane, row, io);
        } else {
            for (int k = lane; k < o.top_k; k += kWarpSize) {
                io.expert_id_TK[t * o.top_k + k] = -1;
                io.weight_TK[t * o.top_k + k] = 0;
            }
        }
        if (lane == 0) {
            io.row_owner_T[t] = segment;
            io.row_stats_T2[2 * t] = stats.most;
            io.row_stats_T2[2 * t + 1] = stats.inverse;
        }
        __syncwarp();
    }
}

// Block (columns, segment, slab): partial[slab][segment][column], tokens ascending within each of kSumRows strides.
template <typename Acc, typename T>
__global__ void __launch_bounds__(kSumRows* kWarpSize)
    sum_kernel(const SelectOptions o, const SelectForwardCuda<Acc> io) {
    __shared__ double shared[kSumRows][kWarpSize];
    const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarpSize + threadIdx.x;
    const int64_t num_slabs = gridDim.z;
    const int64_t begin = o.num_tokens * blockIdx.z / num_slabs;
    const int64_t end = o.num_tokens * (blockIdx.z + 1) / num_slabs;
    for (int64_t segment = blockIdx.y; segment < o.num_segments; segment += gridDim.y) {
        double sum = 0;
        for (int64_t t = begin + threadIdx.y; t < end; t += kSumRows) {
            if (io.row_owner_T[t] != segment || column >= o.num_experts) continue;
            const RowStats<Acc> stats{io.row_stats_T2[2 * t], io.row_stats_T2[2 * t + 1]};
            const Acc logit = load_as<Acc>(static_cast<const T*>(io.logits_TE) + t * io.row_stride, column);
            sum += static_cast<double>(prob_of(o, stats, logit));
        }
        shared[threadIdx.y][threadIdx.x] = sum;
        __syncthreads();
        if (threadIdx.y == 0 && column < o.num_experts) {
            for (int r = 1; r < kSumRows; ++r)
                sum += shared[r][threadIdx.x];
            io.partial[(blockIdx.z * o.num_segments + segment) * o.num_experts + column] = sum;
        }
        __syncthreads();
    }
}

template <typename Acc>
__global__ void finish_sum_kernel(const double* __restrict__ partial, int64_t size, int64_t num_slabs,
                                  Acc* __restrict__ prob_sum) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += stride) {
        double sum = 0;
        for (int64_t slab = 0; slab < num_slabs; ++slab)
            sum += partial[slab * size + i];
        prob_sum[i] = static_cast<Acc>(sum);
    }
}

template <typename Acc, typename T>
cudaError_t launch_typed(const SelectOptions& o, const SelectForwardCuda<Acc>& io, cudaStream_t stream) {
    const int64_t warp_bytes = select_experts_shared_bytes(o, sizeof(Acc));
    if (warp_bytes > kMaxSelectSharedBytes) return cudaErrorInvalidConfiguration;
    const int64_t warps = std::clamp<int64_t>(kMaxSelectSharedBytes / warp_bytes, 1, kMaxWarps);
    const int64_t blocks = std::min((o.num_tokens + warps - 1) / warps, kMaxBlocks);
    const int64_t size = o.num_segments * o.num_experts;
    if (o.num_tokens == 0) return cudaMemsetAsync(io.prob_sum_GE, 0, size * sizeof(Acc), stream);
    select_kernel<Acc, T><<<static_cast<unsigned>(blocks), static_cast<unsigned>(warps * kWarpSize),
                            static_cast<size_t>(warps * warp_bytes), stream>>>(o, io, warp_bytes);

    const int64_t num_slabs = num_slabs_of(o);
    const dim3 grid(static_cast<unsigned>((o.num_experts + kWarpSize - 1) / kWarpSize),
                    static_cast<unsigned>(std::min<int64_t>(o.num_segments, 1 << 15)),
                    static_cast<unsigned>(num_slabs));
    sum_kernel<Acc, T><<<grid, dim3(kWarpSize, kSumRows), 0, stream>>>(o, io);
    const auto finish_blocks = static_cast<unsigned>(std::min((size + 255) / 256, kMaxBlocks));
    finish_sum_kernel<<<finish_blocks, 256, 0, stream>>>(io.partial, size, num_slabs, io.prob_sum_GE);
    return cudaGetLastError();
}

}  // namespace

int64_t select_experts_partial_size(const SelectOptions& o) { return num_slabs_of(o) * o.num_segments * o.num_experts; }

int64_t select_experts_shared_bytes(const SelectOptions& o, int64_t acc_bytes) {
    const int64_t bytes = (2 * o.num_experts + o.num_groups) * acc_bytes + o.top_k * 4;  // as WarpRow
    return (bytes + 15) / 16 * 16;
}

template <typename Acc>
cudaError_t launch_select_experts(const SelectOptions& o, const SelectForwardCuda<Acc>& io, cudaStream_t stream) {
    if constexpr (sizeof(Acc) == 8) {
        return launch_typed<double, double>(o, io, stream);
    } else {
        switch (io.dtype) {
            case Element::kBFloat16:
                return launch_typed<float, __nv_bfloat16>(o, io, stream);
            case Element::kHalf:
                return launch_typed<float, __half>(o, io, stream);
            default:
                return launch_typed<float, float>(o, io, stream);
        }
    }
}

template cudaError_t launch_select_experts(const SelectOptions&, const SelectForwardCuda<float>&, cudaStream_t);
template cudaError_t launch_select_experts(const SelectOptions&, const SelectForwardCuda<double>&, cudaStream_t);

}  // namespace moetrain
