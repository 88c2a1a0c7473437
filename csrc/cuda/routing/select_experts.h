#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/select_experts_math.h"
#include "cuda/common/launch.h"

namespace moetrain {

// Device pointers of one call. Acc is float, or double for float64 logits. bias_E, valid_T, segment_T and breach
// may be null.
template <typename Acc>
struct SelectForwardCuda {
    const void* logits_TE;
    Element dtype;
    int64_t row_stride;  // elements from row to row
    const Acc* bias_E;
    const bool* valid_T;
    const int32_t* segment_T;  // a segment outside [0, num_segments) makes the token count as not valid
    int32_t* expert_id_TK;
    Acc* weight_TK;
    Acc* prob_sum_GE;
    int64_t* count_GE;     // zeroed by the caller
    int32_t* bad_1;        // zeroed by the caller
    Acc* row_stats_T2;     // scratch: a row's largest logit and the inverse of its sum
    int32_t* row_owner_T;  // scratch: a row's segment, or -1 where it enters no statistic
    double* partial;       // scratch of select_experts_partial_size elements
    int64_t* breach;       // holds kNoBreach; gets the least valid token whose segment is out of range
};

template <typename Acc>
struct SelectBackwardCuda {
    const void* logits_TE;
    Element dtype;
    int64_t row_stride;
    const int32_t* expert_id_TK;
    const Acc* dweight;       // [T, K], or [N] where there is place_TK
    const int32_t* place_TK;  // null, or where in dweight each choice's gradient is
    const Acc* dprob_sum_GE;
    const bool* valid_T;
    const int32_t* segment_T;
    void* dlogits_TE;  // contiguous, of the logits' dtype
};

int64_t select_experts_partial_size(const SelectOptions& options);
// Bytes of shared memory that one token needs; more than kMaxSelectSharedBytes is refused.
int64_t select_experts_shared_bytes(const SelectOptions& options, int64_t acc_bytes);
constexpr int64_t kMaxSelectSharedBytes = 48 << 10;

// See select_experts.h in csrc/ops. Sums run in an order fixed by sizes alone.
template <typename Acc>
cudaError_t launch_select_experts(const SelectOptions& options, const SelectForwardCuda<Acc>& io, cudaStream_t stream);
template <typename Acc>
cudaError_t launch_select_experts_backward(const SelectOptions& options, const SelectBackwardCuda<Acc>& io,
                                           cudaStream_t stream);

extern template cudaError_t launch_select_experts(const SelectOptions&, const SelectForwardCuda<float>&, cudaStream_t);
extern template cudaError_t launch_select_experts(const SelectOptions&, const SelectForwardCuda<double>&, cudaStream_t);
extern template cudaError_t launch_select_experts_backward(const SelectOptions&, const SelectBackwardCuda<float>&,
                                                           cudaStream_t);
extern template cudaError_t launch_select_experts_backward(const SelectOptions&, const SelectBackwardCuda<double>&,
                                                           cudaStream_t);

}  // namespace moetrain
