// Gradient of select_experts: a warp per token; scores are computed again from the logits. Compiled for sm_80 and
// sm_90a.
// Gate: 64 registers; LDG LDS SHFL STG STS.
#include <algorithm>

#include "cuda/routing/select_experts.h"
#include "cuda/routing/select_experts_row.cuh"

namespace moetrain {
namespace {

constexpr int kMaxWarps = 4;  // tokens in flight per block
constexpr int kBlocks = 8;    // on a multiprocessor: left to itself, ptxas spares registers and spills

template <typename Acc>
__device__ __forceinline__ bool is_true_expert(const SelectOptions& o, int32_t id) {
    return id >= 0 && id < o.num_true();
}

// The gradients of a token's weights, in its own order or at the places that route gave them. Only those of true
// experts may be read: what else a list of pairs holds means nothing.
template <typename Acc>
struct WeightGradients {
    const Acc* dweight;
    const int32_t* place;  // or null

    __device__ __forceinline__ Acc operator[](int k) const { return dweight[place == nullptr ? k : place[k]]; }
};

template <typename Acc>
__device__ __forceinline__ WeightGradients<Acc> gradients_of(const SelectBackwardCuda<Acc>& io, int64_t first) {
    if (io.place_TK == nullptr) return {io.dweight + first, nullptr};
    return {io.dweight, io.place_TK + first};
}

// `dlogit` comes in holding d prob from the statistics, in shared memory, and leaves holding d logit.
template <typename Acc>
__device__ __forceinline__ void row_backward(const SelectOptions& o, const RowStats<Acc>& stats, const Acc* logit,
                                             const int32_t* id, const WeightGradients<Acc>& dweight, int lane,
                                             Acc* dlogit) {
    const auto scale = static_cast<Acc>(o.scale);
    if (o.weighs_by_probability()) {
        for (int k = lane; k < o.top_k; k += kWarpSize) {
            if (is_true_expert<Acc>(o, id[k])) dlogit[id[k]] += scale * dweight[k];  // a row's ids differ
        }
        __syncwarp();
    }
    Acc dot = 0;
    for (int e = lane; e < o.num_experts; e += kWarpSize)
        dot += prob_of(o, stats, logit[e]) * dlogit[e];
    dot = warp_sum(dot);
    for (int e = lane; e < o.num_experts; e += kWarpSize) {
        dlogit[e] = prob_of(o, stats, logit[e]) * (dlogit[e] - dot);
    }
    __syncwarp();
    if (o.weighs_by_probability()) return;

    // By log(score), as above: scores that vanish would make quotients of nothing.
    const WeightStats<Acc> chosen = weight_stats(o, stats, logit, id, lane);
    Acc chosen_dot = 0;
    if (o.renormalise || chosen.softmax) {
        for (int k = lane; k < o.top_k; k += kWarpSize) {
            if (!is_true_expert<Acc>(o, id[k])) continue;
            chosen_dot += raw_weight(o, stats, chosen, logit[id[k]]) * chosen.inverse * dweight[k];
        }
        chosen_dot = warp_sum(chosen_dot);
    }
    for (int k = lane; k < o.top_k; k += kWarpSize) {
        if (!is_true_expert<Acc>(o, id[k])) continue;
        const Acc weight = raw_weight(o, stats, chosen, logit[id[k]]) * chosen.inverse;
        dlogit[id[k]] += scale * weight * (dweight[k] - chosen_dot);
    }
    __syncwarp();
    if (o.softmax_over_all()) return;
    for (int e = lane; e < o.num_experts; e += kWarpSize)
        dlogit[e] *= lone(o.score, logit[e]).log_slope;
    __syncwarp();
}

template <typename Acc, typename T>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize, kBlocks)
    select_backward_kernel(const SelectOptions o, const SelectBackwardCuda<Acc> io, int64_t warp_bytes) {
    extern __shared__ __align__(16) char memory[];
    const int lane = threadIdx.x % kWarpSize;
    const int warp = threadIdx.x / kWarpSize;
    const int64_t num_warps = blockDim.x / kWarpSize;
    const int64_t E = o.num_experts;
    Acc* logit = reinterpret_cast<Acc*>(memory + warp * warp_bytes);
    Acc* dlogit = logit + E;
    T* out = static_cast<T*>(io.dlogits_TE);
    for (int64_t t = blockIdx.x * num_warps + warp; t < o.num_tokens; t += gridDim.x * num_warps) {
        const int64_t segment = io.segment_T == nullptr ? 0 : io.segment_T[t];
        const bool valid = io.valid_T == nullptr || io.valid_T[t];
        const bool counted = valid && segment >= 0 && segment < o.num_segments &&
                             load_logits(static_cast<const T*>(io.logits_TE) + t * io.row_stride, E, lane, logit);
        if (counted) {
            for (int e = lane; e < E; e += kWarpSize)
                dlogit[e] = io.dprob_sum_GE[segment * E + e];
            __syncwarp();
            const RowStats<Acc> stats = row_stats(o, logit, lane);
            const int32_t* id = io.expert_id_TK + t * o.top_k;
            const WeightGradients<Acc> dweight = gradients_of(io, t * o.top_k);
            row_backward(o, stats, logit, id, dweight, lane, dlogit);
        }
        for (int e = lane; e < E; e += kWarpSize)
            out[t * E + e] = static_cast<T>(counted ? dlogit[e] : Acc(0));
        __syncwarp();
    }
}

template <typename Acc, typename T>
cudaError_t launch_typed(const SelectOptions& o, const SelectBackwardCuda<Acc>& io, cudaStream_t stream) {
    if (o.num_tokens == 0) return cudaSuccess;
    const int64_t warp_bytes = select_experts_shared_bytes(o, sizeof(Acc));
    if (warp_bytes > kMaxSelectSharedBytes) return cudaErrorInvalidConfiguration;
    const int64_t warps = std::clamp<int64_t>(kMaxSelectSharedBytes / warp_bytes, 1, kMaxWarps);
    const int64_t blocks = std::min((o.num_tokens + warps - 1) / warps, kMaxBlocks);
    select_backward_kernel<Acc, T><<<static_cast<unsigned>(blocks), static_cast<unsigned>(warps * kWarpSize),
                                     static_cast<size_t>(warps * warp_bytes), stream>>>(o, io, warp_bytes);
    return cudaGetLastError();
}

}  // namespace

template <typename Acc>
cudaError_t launch_select_experts_backward(const SelectOptions& o, const SelectBackwardCuda<Acc>& io,
                                           cudaStream_t stream) {
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

template cudaError_t launch_select_experts_backward(const SelectOptions&, const SelectBackwardCuda<float>&,
                                                    cudaStream_t);
template cudaError_t launch_select_experts_backward(const SelectOptions&, const SelectBackwardCuda<double>&,
                                                    cudaStream_t);

}  // namespace moetrain
