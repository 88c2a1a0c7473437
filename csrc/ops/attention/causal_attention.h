#pragma once
// causal_attention: y[b, t, h] = sum over keys j of t's document, j <= t, of softmax_j(scale * <q[b, t, h], k[b, j,
// g]>) v[b, j, g], where g = h / (H / G). Shapes: B rows of S tokens, H query heads, G key heads, d head size.
#include <ATen/core/Tensor.h>

#include <tuple>

#include "ops/common/checks.h"
#include "ops/common/row_checks.h"

namespace moetrain {

struct CausalAttention {
    const at::Tensor& q_BSHd;
    const at::Tensor& k_BSGd;
    const at::Tensor& v_BSGd;
    const at::Tensor& first_BS;
    double scale;
};

inline void check_heads(const char* name, const at::Tensor& x, const CausalAttention& in, int64_t heads) {
    constexpr auto kOp = "causal_attention";
    const auto& q = in.q_BSHd;
    check_sizes(kOp, name, x, {q.size(0), q.size(1), heads, q.size(3)}, "[B, S, heads, d]");
    check_same_dtype(kOp, name, x, "q", q);
    check_same_device(kOp, name, x, "q", q);
    check_contiguous_rows(kOp, name, x);
}

// The contract all backends share; throws on the first breach.
inline void check_causal_attention(const CausalAttention& in) {
    constexpr auto kOp = "causal_attention";
    const auto& q = in.q_BSHd;
    TORCH_CHECK_VALUE(q.dim() == 4, kOp, ": q must be [B, S, H, d], got ", q.sizes());
    check_float(kOp, "q", q);
    check_contiguous_rows(kOp, "q", q);
    check_fits_int32(kOp, "S", q.size(1));
    TORCH_CHECK_VALUE(q.size(3) >= 1, kOp, ": heads must have at least one element, got q of ", q.sizes());
    TORCH_CHECK_VALUE(in.k_BSGd.dim() == 4, kOp, ": k must be [B, S, G, d], got ", in.k_BSGd.sizes());
    const int64_t key_heads = in.k_BSGd.size(2);
    TORCH_CHECK_VALUE(key_heads >= 1 && q.size(2) % key_heads == 0, kOp, ": the heads of q (", q.size(2),
                      ") must be a multiple of those of k (", key_heads, "); repeat or drop heads");
    check_heads("k", in.k_BSGd, in, key_heads);
    check_heads("v", in.v_BSGd, in, key_heads);
    check_sizes(kOp, "first", in.first_BS, {q.size(0), q.size(1)}, "[B, S]");
    check_dtype(kOp, "first", in.first_BS, at::kInt);
    check_contiguous(kOp, "first", in.first_BS);
    check_same_device(kOp, "first", in.first_BS, "q", q);
}

// Reads values: first is on the CPU.
inline void check_first_values(const at::Tensor& first_BS) {
    const auto* first = first_BS.const_data_ptr<int32_t>();
    const int64_t length = first_BS.size(1);
    for (int64_t i = 0; i < first_BS.numel(); ++i) {
        const int64_t token = i % length;
        const int32_t least = token == 0 ? 0 : first[i - 1];
        TORCH_CHECK_VALUE(first[i] >= least && first[i] <= token, "causal_attention: first[", i / length, ", ", token,
                          "] is ", first[i], ", but must lie between ", least, " (the token before) and ", token,
                          "; give the row's index of the first token of each token's document");
    }
}

std::tuple<at::Tensor, at::Tensor> causal_attention_cpu(const at::Tensor& q_BSHd, const at::Tensor& k_BSGd,
                                                        const at::Tensor& v_BSGd, const at::Tensor& first_BS,
                                                        double scale);
std::tuple<at::Tensor, at::Tensor, at::Tensor> causal_attention_backward_cpu(
    const at::Tensor& dy_BSHd, const at::Tensor& q_BSHd, const at::Tensor& k_BSGd, const at::Tensor& v_BSGd,
    const at::Tensor& y_BSHd, const at::Tensor& lse_BHS, const at::Tensor& first_BS, double scale);

}  // namespace moetrain
