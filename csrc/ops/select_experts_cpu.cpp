#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../cpu/select_experts.h"
#include "select_experts.h"

namespace moetrain {
namespace {

using OptionalTensor = std::optional<at::Tensor>;

template <typename T>
const T* data_or_null(const OptionalTensor& x) {
    return x ? x->const_data_ptr<T>() : nullptr;
}

LogitRows rows_of(const at::Tensor& logits_TE) {
    return {logits_TE.const_data_ptr(), logits_TE.scalar_type(), logits_TE.stride(0)};
}

// Segments are read where a token is valid, ids always: a bad one must not index memory.
void check_segments(const char* op, const OptionalTensor& segment_T, const OptionalTensor& valid_T,
                    int64_t num_segments) {
    if (!segment_T) return;
    const auto* segment = segment_T->const_data_ptr<int32_t>();
    const bool* valid = data_or_null<bool>(valid_T);
    for (int64_t t = 0; t < segment_T->size(0); ++t) {
        if (valid != nullptr && !valid[t]) continue;
        TORCH_CHECK_VALUE(segment[t] >= 0 && segment[t] < num_segments, op, ": segments must be in [0, ", num_segments,
                          "), got ", segment[t], " at token ", t, "; raise num_segments or mark the token not valid");
    }
}

void check_ids(const char* op, const at::Tensor& expert_id_TK, int64_t num_true) {
    const auto* id = expert_id_TK.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < expert_id_TK.numel(); ++i) {
        TORCH_CHECK_VALUE(id[i] >= -1 && id[i] < num_true, op, ": expert ids must be -1 or in [0, ", num_true,
                          "), got ", id[i], " at position ", i);
    }
}

template <typename Acc>
void forward(const SelectOptions& o, const at::Tensor& logits_TE, const OptionalTensor& bias_E,
             const OptionalTensor& valid_T, const OptionalTensor& segment_T, const std::vector<at::Tensor>& out) {
    select_experts_kernel<Acc>(
        o, {rows_of(logits_TE), data_or_null<Acc>(bias_E), data_or_null<bool>(valid_T),
            data_or_null<int32_t>(segment_T), out[0].mutable_data_ptr<int32_t>(), out[1].mutable_data_ptr<Acc>(),
            out[2].mutable_data_ptr<Acc>(), out[3].mutable_data_ptr<int64_t>(), out[4].mutable_data_ptr<int32_t>()});
}

template <typename Acc>
void backward(const SelectOptions& o, const at::Tensor& logits_TE, const at::Tensor& expert_id_TK,
              const at::Tensor& dweight_TK, const at::Tensor& dprob_sum_GE, const OptionalTensor& valid_T,
              const OptionalTensor& segment_T, const at::Tensor& dlogits_TE) {
    select_experts_backward_kernel<Acc>(
        o, {rows_of(logits_TE), expert_id_TK.const_data_ptr<int32_t>(), dweight_TK.const_data_ptr<Acc>(),
            dprob_sum_GE.const_data_ptr<Acc>(), data_or_null<bool>(valid_T), data_or_null<int32_t>(segment_T),
            dlogits_TE.mutable_data_ptr()});
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> select_experts_cpu(
    const at::Tensor& logits_TE, int64_t top_k, std::string_view score, const OptionalTensor& bias_E, int64_t num_null,
    int64_t num_groups, int64_t groups_kept, std::string_view group_rule, bool renormalise, double scale,
    const OptionalTensor& valid_T, const OptionalTensor& segment_T, int64_t num_segments) {
    constexpr auto op = "select_experts";
    const SelectOptions o = check_select_experts(logits_TE, top_k, score, bias_E, num_null, num_groups, groups_kept,
                                                 group_rule, renormalise, scale, valid_T, segment_T, num_segments);
    check_segments(op, segment_T, valid_T, num_segments);
    const auto dtype = at_least_fp32(logits_TE.scalar_type());
    const auto bias = bias_E ? OptionalTensor(bias_E->to(dtype).contiguous()) : std::nullopt;
    const auto options = logits_TE.options();
    const std::vector<at::Tensor> out = {
        at::empty({o.num_tokens, top_k}, options.dtype(at::kInt)),
        at::empty({o.num_tokens, top_k}, options.dtype(dtype)),
        at::empty({num_segments, o.num_experts}, options.dtype(dtype)),
        at::zeros({num_segments, o.num_experts}, options.dtype(at::kLong)),
        at::zeros({1}, options.dtype(at::kInt)),
    };
    const auto run = dtype == at::kDouble ? forward<double> : forward<float>;
    run(o, logits_TE, bias, valid_T, segment_T, out);
    return {out[0], out[1], out[2], out[3], out[4]};
}

at::Tensor select_experts_backward_cpu(const at::Tensor& dweight_TK, const at::Tensor& dprob_sum_GE,
                                       const at::Tensor& logits_TE, const at::Tensor& expert_id_TK,
                                       std::string_view score, int64_t num_null, bool renormalise, double scale,
                                       const OptionalTensor& valid_T, const OptionalTensor& segment_T) {
    constexpr auto op = "select_experts_backward";
    const SelectOptions o = check_select_experts_backward(dweight_TK, dprob_sum_GE, logits_TE, expert_id_TK, score,
                                                          num_null, renormalise, scale, valid_T, segment_T);
    check_segments(op, segment_T, valid_T, o.num_segments);
    check_ids(op, expert_id_TK, o.num_true());
    auto dlogits_TE = at::empty(logits_TE.sizes(), logits_TE.options());
    const auto run = dweight_TK.scalar_type() == at::kDouble ? backward<double> : backward<float>;
    run(o, logits_TE, expert_id_TK, dweight_TK.contiguous(), dprob_sum_GE.contiguous(), valid_T, segment_T, dlogits_TE);
    return dlogits_TE;
}

TORCH_LIBRARY_IMPL(moetrain, CPU, m) {
    m.impl("select_experts", &select_experts_cpu);
    m.impl("select_experts_backward", &select_experts_backward_cpu);
}

}  // namespace moetrain
