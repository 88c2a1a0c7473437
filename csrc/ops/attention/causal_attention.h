#pragma once
// causal_attention: y[t, h] = sum over keys j of t's document, j <= t, of softmax_j(scale * <q[t, h], k[j, g]>) v[j,
// g], where g = h / (H / G). Shapes: T tokens in R rows of whole documents, H query heads, G key heads, d head size.
#include <ATen/core/Tensor.h>

#include <tuple>
#include <utility>

#include "ops/common/checks.h"
#include "ops/common/row_checks.h"

namespace moetrain {

struct CausalAttention {
    const at::Tensor& q_THd;
    const at::Tensor& k_TGd;
    const at::Tensor& v_TGd;
    const at::Tensor& first_T;
    const at::Tensor& offset_R1;
    double scale;
};

inline void check_heads(const char* name, const at::Tensor& x, const CausalAttention& in, int64_t heads) {
    constexpr auto kOp = "causal_attention";
    const auto& q = in.q_THd;
    check_sizes(kOp, name, x, {q.size(0), heads, q.size(2)}, "[T, heads, d]");
    check_same_dtype(kOp, name, x, "q", q);
    check_same_device(kOp, name, x, "q", q);
    check_contiguous_rows(kOp, name, x);
}

// The contract all backends share; throws on the first breach.
inline void check_causal_attention(const CausalAttention& in) {
    constexpr auto kOp = "causal_attention";
    const auto& q = in.q_THd;
    TORCH_CHECK_VALUE(q.dim() == 3, kOp, ": q must be [T, H, d], got ", q.sizes());
    check_float(kOp, "q", q);
    check_contiguous_rows(kOp, "q", q);
    check_fits_int32(kOp, "T", q.size(0));
    TORCH_CHECK_VALUE(q.size(2) >= 1, kOp, ": heads must have at least one element, got q of ", q.sizes());
    TORCH_CHECK_VALUE(in.k_TGd.dim() == 3, kOp, ": k must be [T, G, d], got ", in.k_TGd.sizes());
    const int64_t key_heads = in.k_TGd.size(1);
    TORCH_CHECK_VALUE(key_heads >= 1 && q.size(1) % key_heads == 0, kOp, ": the heads of q (", q.size(1),
                      ") must be a multiple of those of k (", key_heads, "); repeat or drop heads");
    check_heads("k", in.k_TGd, in, key_heads);
    check_heads("v", in.v_TGd, in, key_heads);
    check_sizes(kOp, "first", in.first_T, {q.size(0)}, "[T]");
    TORCH_CHECK_VALUE(in.offset_R1.dim() == 1 && in.offset_R1.size(0) >= 1, kOp, ": offset must be [R + 1], got ",
                      in.offset_R1.sizes());
    for (const auto& [name, list] :
         {std::pair<const char*, const at::Tensor&>{"first", in.first_T}, {"offset", in.offset_R1}}) {
        check_dtype(kOp, name, list, at::kInt);
        check_contiguous(kOp, name, list);
        check_same_device(kOp, name, list, "q", q);
    }
}

// Reads values: first and offset are on the CPU.
inline void check_documents(const at::Tensor& first_T, const at::Tensor& offset_R1) {
    constexpr auto kOp = "causal_attention";
    const auto *first = first_T.const_data_ptr<int32_t>(), *offset = offset_R1.const_data_ptr<int32_t>();
    const int64_t num_rows = offset_R1.size(0) - 1;
    TORCH_CHECK_VALUE(offset[0] == 0 && offset[num_rows] == first_T.size(0), kOp,
                      ": offset must go from 0 to T = ", first_T.size(0), ", got ", offset[0], " to ",
                      offset[num_rows]);
    for (int64_t row = 0; row < num_rows; ++row) {
        TORCH_CHECK_VALUE(offset[row] <= offset[row + 1], kOp, ": offset must ascend, got ", offset[row], " before ",
                          offset[row + 1], " for row ", row);
        int32_t least = offset[row];
        for (int32_t token = offset[row]; token < offset[row + 1]; least = first[token++]) {
            TORCH_CHECK_VALUE(first[token] >= least && first[token] <= token, kOp, ": first[", token, "] is ",
                              first[token], ", but must lie between ", least,
                              token == offset[row] ? " (where its row begins) and " : " (the token before) and ", token,
                              "; give the index of the first token of each token's document");
        }
    }
}

std::tuple<at::Tensor, at::Tensor> causal_attention_cpu(const at::Tensor& q_THd, const at::Tensor& k_TGd,
                                                        const at::Tensor& v_TGd, const at::Tensor& first_T,
                                                        const at::Tensor& offset_R1, double scale);
std::tuple<at::Tensor, at::Tensor, at::Tensor> causal_attention_backward_cpu(
    const at::Tensor& dy_THd, const at::Tensor& q_THd, const at::Tensor& k_TGd, const at::Tensor& v_TGd,
    const at::Tensor& y_THd, const at::Tensor& lse_HT, const at::Tensor& first_T, const at::Tensor& offset_R1,
    double scale);

}  // namespace moetrain
