// Contract of select_experts: token-choice top-k under a total order, with weights, statistics and gradient.
//
// Order: (score + bias descending, expert id ascending). Without a bias the logits themselves are compared, since
// every score rises with its logit: no rounding can then create a tie, and every device chooses alike.
#pragma once
#include <cmath>
#include <string_view>
#include <tuple>

#include "common/select_experts_math.h"
#include "ops/common/checks.h"
#include "ops/common/optional.h"

namespace moetrain {

inline Score parse_score(const char* op, std::string_view name) {
    if (name == "softmax") return Score::kSoftmax;
    if (name == "topk_softmax") return Score::kTopkSoftmax;
    if (name == "sigmoid") return Score::kSigmoid;
    TORCH_CHECK_VALUE(name == "sqrtsoftplus", op,
                      ": score must be 'softmax', 'topk_softmax', 'sigmoid' or 'sqrtsoftplus', got '", name, "'");
    return Score::kSqrtSoftplus;
}

inline GroupRule parse_group_rule(const char* op, std::string_view name) {
    if (name == "top2_sum") return GroupRule::kTop2Sum;
    TORCH_CHECK_VALUE(name == "max", op, ": group_rule must be 'top2_sum' or 'max', got '", name, "'");
    return GroupRule::kMax;
}

inline void check_logits(const char* op, const at::Tensor& logits_TE) {
    TORCH_CHECK_VALUE(logits_TE.dim() == 2 && logits_TE.size(1) >= 1, op, ": logits must be [T, E] with E >= 1, got ",
                      logits_TE.sizes());
    check_float(op, "logits", logits_TE);
    check_contiguous_rows(op, "logits", logits_TE);
    check_fits_int32(op, "the number of experts", logits_TE.size(1));
}

inline void check_token_masks(const char* op, const at::Tensor& logits_TE, const OptionalTensor& valid_T,
                              const OptionalTensor& segment_T) {
    const int64_t num_tokens = logits_TE.size(0);
    if (valid_T) {
        check_dtype(op, "valid", *valid_T, at::kBool);
        check_sizes(op, "valid", *valid_T, {num_tokens}, "[T]");
        check_contiguous(op, "valid", *valid_T);
        check_same_device(op, "valid", *valid_T, "logits", logits_TE);
    }
    if (segment_T) {
        check_dtype(op, "segment", *segment_T, at::kInt);
        check_sizes(op, "segment", *segment_T, {num_tokens}, "[T]");
        check_contiguous(op, "segment", *segment_T);
        check_same_device(op, "segment", *segment_T, "logits", logits_TE);
    }
}

inline void check_choice(const char* op, const SelectOptions& o) {
    TORCH_CHECK_VALUE(o.num_null >= 0 && o.num_null < o.num_experts, op,
                      ": num_null must be between 0 and E - 1 = ", o.num_experts - 1, ", got ", o.num_null,
                      "; the null experts are the last columns of logits");
    TORCH_CHECK_VALUE(o.num_groups >= 1 && o.num_experts % o.num_groups == 0, op, ": num_groups (", o.num_groups,
                      ") must be at least 1 and divide the number of experts (", o.num_experts, ")");
    TORCH_CHECK_VALUE(o.num_null == 0 || o.num_groups == 1, op, ": num_null (", o.num_null, ") and num_groups (",
                      o.num_groups, ") do not go together; use one group");
    TORCH_CHECK_VALUE(o.groups_kept >= 1 && o.groups_kept <= o.num_groups, op,
                      ": groups_kept must be between 1 and num_groups (", o.num_groups, "), got ", o.groups_kept);
    const int64_t reachable = o.groups_kept * o.group_size();
    TORCH_CHECK_VALUE(o.top_k >= 1 && o.top_k <= reachable, op, ": top_k must be between 1 and ", reachable,
                      " (experts within the groups kept), got ", o.top_k);
    TORCH_CHECK_VALUE(o.num_segments >= 1, op, ": num_segments must be at least 1, got ", o.num_segments);
    TORCH_CHECK_VALUE(std::isfinite(o.scale), op, ": scale must be finite, got ", o.scale);
}

inline void check_bias(const char* op, const at::Tensor& logits_TE, const OptionalTensor& bias_E) {
    if (!bias_E) return;
    check_float(op, "bias", *bias_E);
    check_sizes(op, "bias", *bias_E, {logits_TE.size(1)}, "[E]");
    check_same_device(op, "bias", *bias_E, "logits", logits_TE);
}

inline void check_select_gradients(const char* op, const at::Tensor& logits_TE, const at::Tensor& expert_id_TK,
                                   const at::Tensor& dweight_TK, const at::Tensor& dprob_sum_GE) {
    const int64_t num_tokens = logits_TE.size(0);
    TORCH_CHECK_VALUE(expert_id_TK.dim() == 2 && expert_id_TK.size(0) == num_tokens, op,
                      ": expert_id must be [T, K] with T = ", num_tokens, ", got ", expert_id_TK.sizes());
    check_dtype(op, "expert_id", expert_id_TK, at::kInt);
    check_contiguous(op, "expert_id", expert_id_TK);
    check_same_device(op, "expert_id", expert_id_TK, "logits", logits_TE);
    const auto dtype = at_least_fp32(logits_TE.scalar_type());
    check_dtype(op, "dweight", dweight_TK, dtype);
    check_sizes(op, "dweight", dweight_TK, expert_id_TK.sizes(), "[T, K]");
    check_same_device(op, "dweight", dweight_TK, "logits", logits_TE);
    check_dtype(op, "dprob_sum", dprob_sum_GE, dtype);
    TORCH_CHECK_VALUE(dprob_sum_GE.dim() == 2 && dprob_sum_GE.size(1) == logits_TE.size(1), op,
                      ": dprob_sum must be [G, E] with E = ", logits_TE.size(1), ", got ", dprob_sum_GE.sizes());
    check_same_device(op, "dprob_sum", dprob_sum_GE, "logits", logits_TE);
}

// `op` is the operator that says so: select_experts or route.
inline SelectOptions check_select_experts(const char* op, const at::Tensor& logits_TE, int64_t top_k,
                                          std::string_view score, const OptionalTensor& bias_E, int64_t num_null,
                                          int64_t num_groups, int64_t groups_kept, std::string_view group_rule,
                                          bool renormalise, double scale, const OptionalTensor& valid_T,
                                          const OptionalTensor& segment_T, int64_t num_segments) {
    check_logits(op, logits_TE);
    check_token_masks(op, logits_TE, valid_T, segment_T);
    check_bias(op, logits_TE, bias_E);
    const SelectOptions options{
        .num_tokens = logits_TE.size(0),
        .num_experts = logits_TE.size(1),
        .top_k = top_k,
        .num_null = num_null,
        .num_groups = num_groups,
        .groups_kept = groups_kept,
        .num_segments = num_segments,
        .scale = scale,
        .score = parse_score(op, score),
        .group_rule = parse_group_rule(op, group_rule),
        .renormalise = renormalise,
    };
    check_choice(op, options);
    TORCH_CHECK_VALUE(segment_T || num_segments == 1, op, ": num_segments is ", num_segments,
                      " but there is no segment; pass each token's segment");
    return options;
}

inline SelectOptions check_select_experts_backward(const char* op, const at::Tensor& dweight_TK,
                                                   const at::Tensor& dprob_sum_GE, const at::Tensor& logits_TE,
                                                   const at::Tensor& expert_id_TK, std::string_view score,
                                                   int64_t num_null, bool renormalise, double scale,
                                                   const OptionalTensor& valid_T, const OptionalTensor& segment_T) {
    check_logits(op, logits_TE);
    check_token_masks(op, logits_TE, valid_T, segment_T);
    check_select_gradients(op, logits_TE, expert_id_TK, dweight_TK, dprob_sum_GE);
    const SelectOptions options{
        .num_tokens = logits_TE.size(0),
        .num_experts = logits_TE.size(1),
        .top_k = expert_id_TK.size(1),
        .num_null = num_null,
        .num_segments = dprob_sum_GE.size(0),
        .scale = scale,
        .score = parse_score(op, score),
        .renormalise = renormalise,
    };
    check_choice(op, options);
    return options;
}

// (expert_id_TK, weight_TK, prob_sum_GE, count_GE, bad_1). A token that is not valid, or whose logits (or biased
// scores) are not all finite, has ids -1 and weights 0 and enters no statistic; the latter kind sets bad. A null
// expert that is chosen has id -1 and weight 0, and is counted. Sums over tokens run in an order fixed by sizes alone.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> select_experts_cpu(
    const at::Tensor& logits_TE, int64_t top_k, std::string_view score, const OptionalTensor& bias_E, int64_t num_null,
    int64_t num_groups, int64_t groups_kept, std::string_view group_rule, bool renormalise, double scale,
    const OptionalTensor& valid_T, const OptionalTensor& segment_T, int64_t num_segments);
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> select_experts_cuda(
    const at::Tensor& logits_TE, int64_t top_k, std::string_view score, const OptionalTensor& bias_E, int64_t num_null,
    int64_t num_groups, int64_t groups_kept, std::string_view group_rule, bool renormalise, double scale,
    const OptionalTensor& valid_T, const OptionalTensor& segment_T, int64_t num_segments);

// d logits_TE, in the logits' dtype, from the gradients of weight_TK and prob_sum_GE.
at::Tensor select_experts_backward_cpu(const at::Tensor& dweight_TK, const at::Tensor& dprob_sum_GE,
                                       const at::Tensor& logits_TE, const at::Tensor& expert_id_TK,
                                       std::string_view score, int64_t num_null, bool renormalise, double scale,
                                       const OptionalTensor& valid_T, const OptionalTensor& segment_T);
at::Tensor select_experts_backward_cuda(const at::Tensor& dweight_TK, const at::Tensor& dprob_sum_GE,
                                        const at::Tensor& logits_TE, const at::Tensor& expert_id_TK,
                                        std::string_view score, int64_t num_null, bool renormalise, double scale,
                                        const OptionalTensor& valid_T, const OptionalTensor& segment_T);
// The same for route, whose dweight holds choice p's gradient at place_TK[p]; what `check_select_experts_backward`
// checks holds already.
at::Tensor run_select_backward_cuda(const char* op, const SelectOptions& options, const at::Tensor& logits_TE,
                                    const at::Tensor& expert_id_TK, const at::Tensor& dweight,
                                    const OptionalTensor& place_TK, const at::Tensor& dprob_sum_GE,
                                    const OptionalTensor& valid_T, const OptionalTensor& segment_T);

}  // namespace moetrain
