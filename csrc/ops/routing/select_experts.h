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
#include "ops/common/fields.h"
#include "ops/common/optional.h"

namespace moetrain {

// Which tokens count, and to which statistic each belongs.
struct TokenMasks {
    OptionalTensor valid_T;    // bool
    OptionalTensor segment_T;  // int32

    using Fields = FieldTypes<OptionalTensor, OptionalTensor>;
};

// What select_experts and route are called with.
struct SelectInput {
    at::Tensor logits_TE;
    int64_t top_k;
    std::string_view score;
    OptionalTensor bias_E;
    int64_t num_null;
    int64_t num_groups;
    int64_t groups_kept;
    std::string_view group_rule;
    bool renormalise;
    double scale;
    TokenMasks masks;
    int64_t num_segments;

    using Fields = FieldTypes<at::Tensor, int64_t, std::string_view, OptionalTensor, int64_t, int64_t, int64_t,
                              std::string_view, bool, double, TokenMasks, int64_t>;
};

// What their backward passes are called with: gradients, what was selected, and how scores became weights.
struct SelectGradients {
    at::Tensor dweight;  // [T, K], or route's [T * K]
    at::Tensor dprob_sum_GE;
    at::Tensor logits_TE;
    at::Tensor expert_id_TK;

    using Fields = FieldTypes<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
};
struct WeightOptions {
    std::string_view score;
    int64_t num_null;
    bool renormalise;
    double scale;
    TokenMasks masks;

    using Fields = FieldTypes<std::string_view, int64_t, bool, double, TokenMasks>;
};

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

inline void check_token_masks(const char* op, const at::Tensor& logits_TE, const TokenMasks& masks) {
    const auto& [valid_T, segment_T] = masks;
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

inline void check_select_gradients(const char* op, const SelectGradients& in) {
    const auto& [dweight_TK, dprob_sum_GE, logits_TE, expert_id_TK] = in;
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
inline SelectOptions check_select_experts(const char* op, const SelectInput& in) {
    check_logits(op, in.logits_TE);
    check_token_masks(op, in.logits_TE, in.masks);
    check_bias(op, in.logits_TE, in.bias_E);
    const SelectOptions options{
        .num_tokens = in.logits_TE.size(0),
        .num_experts = in.logits_TE.size(1),
        .top_k = in.top_k,
        .num_null = in.num_null,
        .num_groups = in.num_groups,
        .groups_kept = in.groups_kept,
        .num_segments = in.num_segments,
        .scale = in.scale,
        .score = parse_score(op, in.score),
        .group_rule = parse_group_rule(op, in.group_rule),
        .renormalise = in.renormalise,
    };
    check_choice(op, options);
    TORCH_CHECK_VALUE(in.masks.segment_T || in.num_segments == 1, op, ": num_segments is ", in.num_segments,
                      " but there is no segment; pass each token's segment");
    return options;
}

// dweight is [T, K].
inline SelectOptions check_select_experts_backward(const char* op, const SelectGradients& in,
                                                   const WeightOptions& how) {
    check_logits(op, in.logits_TE);
    check_token_masks(op, in.logits_TE, how.masks);
    check_select_gradients(op, in);
    const SelectOptions options{
        .num_tokens = in.logits_TE.size(0),
        .num_experts = in.logits_TE.size(1),
        .top_k = in.expert_id_TK.size(1),
        .num_null = how.num_null,
        .num_segments = in.dprob_sum_GE.size(0),
        .scale = how.scale,
        .score = parse_score(op, how.score),
        .renormalise = how.renormalise,
    };
    check_choice(op, options);
    return options;
}

// (expert_id_TK, weight_TK, prob_sum_GE, count_GE, bad_1). A token that is not valid, or whose logits (or biased
// scores) are not all finite, has ids -1 and weights 0 and enters no statistic; the latter kind sets bad. A null
// expert that is chosen has id -1 and weight 0, and is counted. Sums over tokens run in an order fixed by sizes alone.
using SelectOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
SelectOutputs select_experts_cpu(const SelectInput& in);
SelectOutputs select_experts_cuda(const SelectInput& in);

// d logits_TE, in the logits' dtype, from the gradients of weight_TK and prob_sum_GE.
at::Tensor select_experts_backward_cpu(const SelectGradients& in, const WeightOptions& how);
at::Tensor select_experts_backward_cuda(const SelectGradients& in, const WeightOptions& how);
// The same for route, whose dweight holds choice p's gradient at place_TK[p]; what `check_select_experts_backward`
// checks holds already.
at::Tensor run_select_backward_cuda(const char* op, const SelectOptions& options, const SelectGradients& in,
                                    const OptionalTensor& place_TK, const TokenMasks& masks);

}  // namespace moetrain
