// Contract of plan_sends and plan_receives: which rows travel where, one token once per destination rank.
#pragma once
#include <tuple>

#include "ops/common/checks.h"

namespace moetrain {

inline void check_index_list(const char* op, const char* name, const at::Tensor& x) {
    TORCH_CHECK_VALUE(x.dim() == 1, op, ": ", name, " must have one dimension, got ", x.sizes());
    check_dtype(op, name, x, at::kInt);
    check_contiguous(op, name, x);
}

inline void check_plan_sends(const at::Tensor& token_N, const at::Tensor& offset_E1, const at::Tensor& rank_E,
                             const at::Tensor& local_E, const at::Tensor& bad_1, int64_t num_tokens, int64_t num_ranks,
                             int64_t max_local) {
    constexpr auto op = "plan_sends";
    check_index_list(op, "token", token_N);
    check_index_list(op, "offset", offset_E1);
    check_index_list(op, "rank", rank_E);
    check_index_list(op, "local", local_E);
    TORCH_CHECK_VALUE(offset_E1.size(0) >= 1, op, ": offset must be [E + 1], got [0]; give 0 alone for no experts");
    check_sizes(op, "rank", rank_E, {offset_E1.size(0) - 1}, "[E]");
    check_sizes(op, "local", local_E, {offset_E1.size(0) - 1}, "[E]");
    check_sizes(op, "bad", bad_1, {1}, "[1]");
    check_dtype(op, "bad", bad_1, at::kInt);
    check_fits_int32(op, "the number of pairs", token_N.size(0));
    TORCH_CHECK_VALUE(num_tokens >= 0 && num_ranks >= 1 && max_local >= 0, op,
                      ": num_tokens and max_local must be at least 0 and num_ranks at least 1, got ", num_tokens, ", ",
                      max_local, " and ", num_ranks);
    check_fits_int32(op, "num_ranks * num_tokens", num_ranks * num_tokens);
}

// (token_C, pair_N, row_N, counts_WK), C = min(N, W * T):
//   token_C: the token of each row that leaves, by (destination, token); what lies beyond their number is unwritten.
//   pair_N: pairs by destination, in the order they came inside one; the list's tail is unwritten.
//   row_N: each such pair's row inside its destination's block.
//   counts_WK: int64 [W, 2 + max_local]: rows for each destination, bad_1, pairs for each of its experts.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> plan_sends_cpu(
    const at::Tensor& token_N, const at::Tensor& offset_E1, const at::Tensor& rank_E, const at::Tensor& local_E,
    const at::Tensor& bad_1, int64_t num_tokens, int64_t num_ranks, int64_t max_local);

inline void check_plan_receives(const at::Tensor& row_P, const at::Tensor& counts_WK, int64_t num_local) {
    constexpr auto op = "plan_receives";
    check_index_list(op, "row", row_P);
    check_fits_int32(op, "the number of pairs", row_P.size(0));
    check_dtype(op, "counts", counts_WK, at::kLong);
    check_contiguous(op, "counts", counts_WK);
    TORCH_CHECK_VALUE(counts_WK.dim() == 2 && num_local >= 0 && counts_WK.size(1) >= 2 + num_local, op,
                      ": counts must be [W, K] with K at least 2 + num_local = ", 2 + num_local, ", got ",
                      counts_WK.sizes());
}

// (pair_P, row_P, offset_e1): received pairs, which lie by (source, expert, as sent), by (expert, source, as sent).
//   pair_P: each one's place in the list that came; row_P: its row among all received ones.
std::tuple<at::Tensor, at::Tensor, at::Tensor> plan_receives_cpu(const at::Tensor& row_P, const at::Tensor& counts_WK,
                                                                 int64_t num_local);

}  // namespace moetrain
