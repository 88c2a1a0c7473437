#pragma once
#include <c10/core/ScalarType.h>

#include <vector>

#include "common/select_experts_math.h"

namespace moetrain {

// [T, E] logits of any floating dtype; rows may be apart.
struct LogitRows {
    const void* data;
    at::ScalarType dtype;
    int64_t stride;  // elements from row to row
};

// Acc is float, or double for float64 logits. bias_E, valid_T and segment_T may be null.
template <typename Acc>
struct SelectForward {
    LogitRows logits;
    const Acc* bias_E;
    const bool* valid_T;
    const int32_t* segment_T;  // in [0, num_segments) where valid
    int32_t* expert_id_TK;
    Acc* weight_TK;
    Acc* prob_sum_GE;
    int64_t* count_GE;  // zeroed by the caller
    int32_t* bad_1;     // zeroed by the caller
};

template <typename Acc>
struct SelectBackward {
    LogitRows logits;
    const int32_t* expert_id_TK;
    const Acc* dweight;       // [T, K], or [N] where there is place_TK
    const int32_t* place_TK;  // null, or where in dweight each choice's gradient is
    const Acc* dprob_sum_GE;
    const bool* valid_T;
    const int32_t* segment_T;
    void* dlogits_TE;  // contiguous, of the logits' dtype
};

// Tokens are worked on in chunks of this many, the last one perhaps less: whatever the number of threads.
int64_t select_chunk_size(const SelectOptions& options);

// Returns each chunk's choices [chunk, G, E], null experts included.
template <typename Acc>
std::vector<int32_t> select_experts_kernel(const SelectOptions& options, const SelectForward<Acc>& io);
template <typename Acc>
void select_experts_backward_kernel(const SelectOptions& options, const SelectBackward<Acc>& io);

extern template std::vector<int32_t> select_experts_kernel(const SelectOptions&, const SelectForward<float>&);
extern template std::vector<int32_t> select_experts_kernel(const SelectOptions&, const SelectForward<double>&);
extern template void select_experts_backward_kernel(const SelectOptions&, const SelectBackward<float>&);
extern template void select_experts_backward_kernel(const SelectOptions&, const SelectBackward<double>&);

}  // namespace moetrain
