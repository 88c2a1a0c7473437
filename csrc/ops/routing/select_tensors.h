// What select_experts and route share on the CPU.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "cpu/routing/select_experts.h"
#include "ops/common/optional.h"
#include "ops/common/tensors.h"
#include "ops/routing/select_experts.h"

namespace moetrain {

inline LogitRows rows_of(const at::Tensor& logits_TE) {
    return {logits_TE.const_data_ptr(), logits_TE.scalar_type(), logits_TE.stride(0)};
}

// Segments are read where a token is valid, ids always: a bad one must not index memory.
inline void check_segments(const char* op, const TokenMasks& masks, int64_t num_segments) {
    const auto& [valid_T, segment_T] = masks;
    if (!segment_T) return;
    const auto* segment = segment_T->const_data_ptr<int32_t>();
    const bool* valid = data_or_null<bool>(valid_T);
    for (int64_t t = 0; t < segment_T->size(0); ++t) {
        if (valid != nullptr && !valid[t]) continue;
        TORCH_CHECK_VALUE(segment[t] >= 0 && segment[t] < num_segments, op, ": segments must be in [0, ", num_segments,
                          "), got ", segment[t], " at token ", t, "; raise num_segments or mark the token not valid");
    }
}

inline void check_ids(const char* op, const at::Tensor& expert_id_TK, int64_t num_true) {
    const auto* id = expert_id_TK.const_data_ptr<int32_t>();
    const int64_t size = expert_id_TK.numel();
    bool inside = true;
    for (int64_t i = 0; i < size; ++i)
        inside &= (id[i] >= -1) & (id[i] < num_true);
    if (inside) return;
    for (int64_t i = 0; i < size; ++i) {
        TORCH_CHECK_VALUE(id[i] >= -1 && id[i] < num_true, op, ": expert ids must be -1 or in [0, ", num_true,
                          "), got ", id[i], " at position ", i);
    }
}

// The outputs of the selection, and what it reads in the dtype that it wants.
struct SelectTensors {
    at::Tensor expert_id_TK, weight_TK, prob_sum_GE, count_GE, bad_1;
    OptionalTensor bias_E;
};

inline SelectTensors new_select_tensors(const SelectOptions& o, const SelectInput& in) {
    const auto options = in.logits_TE.options();
    const auto dtype = at_least_fp32(in.logits_TE.scalar_type());
    return {
        .expert_id_TK = new_empty({o.num_tokens, o.top_k}, options.dtype(at::kInt)),
        .weight_TK = new_empty({o.num_tokens, o.top_k}, options.dtype(dtype)),
        .prob_sum_GE = new_empty({o.num_segments, o.num_experts}, options.dtype(dtype)),
        .count_GE = new_zeros({o.num_segments, o.num_experts}, options.dtype(at::kLong)),
        .bad_1 = new_zeros({1}, options.dtype(at::kInt)),
        .bias_E = in.bias_E ? OptionalTensor(in.bias_E->to(dtype).contiguous()) : std::nullopt,
    };
}

template <typename Acc>
SelectForward<Acc> select_forward_of(const SelectTensors& tensors, const SelectInput& in) {
    return {
        .logits = rows_of(in.logits_TE),
        .bias_E = data_or_null<Acc>(tensors.bias_E),
        .valid_T = data_or_null<bool>(in.masks.valid_T),
        .segment_T = data_or_null<int32_t>(in.masks.segment_T),
        .expert_id_TK = tensors.expert_id_TK.mutable_data_ptr<int32_t>(),
        .weight_TK = tensors.weight_TK.mutable_data_ptr<Acc>(),
        .prob_sum_GE = tensors.prob_sum_GE.mutable_data_ptr<Acc>(),
        .count_GE = tensors.count_GE.mutable_data_ptr<int64_t>(),
        .bad_1 = tensors.bad_1.mutable_data_ptr<int32_t>(),
    };
}

// place_TK as in SelectBackward.
template <typename Acc>
void run_select_backward(const SelectOptions& o, const SelectGradients& in, const OptionalTensor& place_TK,
                         const TokenMasks& masks, const at::Tensor& dlogits_TE) {
    const auto dweight = in.dweight.contiguous();
    const auto dprob_sum_GE = in.dprob_sum_GE.contiguous();
    select_experts_backward_kernel<Acc>(o, {
                                               .logits = rows_of(in.logits_TE),
                                               .expert_id_TK = in.expert_id_TK.const_data_ptr<int32_t>(),
                                               .dweight = dweight.const_data_ptr<Acc>(),
                                               .place_TK = data_or_null<int32_t>(place_TK),
                                               .dprob_sum_GE = dprob_sum_GE.const_data_ptr<Acc>(),
                                               .valid_T = data_or_null<bool>(masks.valid_T),
                                               .segment_T = data_or_null<int32_t>(masks.segment_T),
                                               .dlogits_TE = dlogits_TE.mutable_data_ptr(),
                                           });
}

}  // namespace moetrain
