#pragma once
// attend_: for every segment, out[i, h] = sum over its keys j of softmax_j(scale * <q[i, h], k[j, g]>) v[j, g], where g
// = h / (H / G), continued from the out and lse that are given: softmax is over all keys that a query has seen so far.
// Shapes: Q queries of H heads, K keys of G heads, d head size; S segments, each a range of queries and one of keys.
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <vector>

#include "ops/common/checks.h"
#include "ops/common/row_checks.h"

namespace moetrain {

// A segment whose causal flag is set is square, and its query i sees the keys up to i; else queries see all of its
// keys.
struct Attend {
    const at::Tensor& q_QHd;
    const at::Tensor& k_KGd;
    const at::Tensor& v_KGd;
    const at::Tensor& range_q_S2;
    const at::Tensor& range_k_S2;
    bool causal;
    double scale;
};

inline void check_token_heads(const char* op, const char* name, const at::Tensor& x, int64_t tokens, int64_t heads,
                              const Attend& in, at::ScalarType dtype) {
    check_sizes(op, name, x, {tokens, heads, in.q_QHd.size(2)}, "[tokens, heads, d]");
    check_dtype(op, name, x, dtype);
    check_same_device(op, name, x, "q", in.q_QHd);
    check_contiguous_rows(op, name, x);
}

inline void check_token_range(const char* op, const char* name, const at::Tensor& range_S2, int64_t tokens,
                              const char* of) {
    TORCH_CHECK_VALUE(range_S2.dim() == 2 && range_S2.size(1) == 2, op, ": ", name, " must be [S, 2], got ",
                      range_S2.sizes());
    check_dtype(op, name, range_S2, at::kInt);
    check_contiguous(op, name, range_S2);
    TORCH_CHECK_VALUE(range_S2.device().is_cpu(), op, ": ", name, " must be on the CPU, got ", range_S2.device());
    const auto* range = range_S2.const_data_ptr<int32_t>();
    for (int64_t s = 0; s < range_S2.size(0); ++s) {
        const int32_t begin = range[2 * s], end = range[2 * s + 1];
        TORCH_CHECK_VALUE(0 <= begin && begin <= end && end <= tokens, op, ": ", name, "[", s,
                          "] must be a range within ", of, " = ", tokens, ", got ", begin, " to ", end);
    }
}

// Indices of the segments by the first of their queries (or keys), those without any left out.
inline std::vector<int64_t> by_begin(const int32_t* range, int64_t num_segments) {
    std::vector<int64_t> order;
    for (int64_t s = 0; s < num_segments; ++s) {
        if (range[2 * s] < range[2 * s + 1]) order.push_back(s);
    }
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return range[2 * a] < range[2 * b]; });
    return order;
}

inline void check_segments(const char* op, const Attend& in) {
    const int64_t num_segments = in.range_q_S2.size(0);
    check_sizes(op, "range_k", in.range_k_S2, {num_segments, 2}, "[S, 2]");
    const auto* q = in.range_q_S2.const_data_ptr<int32_t>();
    const auto* k = in.range_k_S2.const_data_ptr<int32_t>();
    for (int64_t s = 0; in.causal && s < num_segments; ++s) {
        const int32_t queries = q[2 * s + 1] - q[2 * s], keys = k[2 * s + 1] - k[2 * s];
        TORCH_CHECK_VALUE(queries == keys, op, ": a causal segment must have as many keys as queries, got ", queries,
                          " queries and ", keys, " keys in segment ", s, "; split it, or pass causal=False");
    }
    const std::vector<int64_t> order = by_begin(q, num_segments);
    for (size_t i = 1; i < order.size(); ++i) {
        TORCH_CHECK_VALUE(q[2 * order[i - 1] + 1] <= q[2 * order[i]], op, ": segments must not share queries, got ",
                          q[2 * order[i - 1]], " to ", q[2 * order[i - 1] + 1], " and ", q[2 * order[i]], " to ",
                          q[2 * order[i] + 1], "; attend to their keys in two calls, the second continuing the first");
    }
}

inline void check_attend_inputs(const char* op, const Attend& in) {
    const auto &q = in.q_QHd, &k = in.k_KGd;
    TORCH_CHECK_VALUE(q.dim() == 3, op, ": q must be [Q, H, d], got ", q.sizes());
    check_float(op, "q", q);
    check_contiguous_rows(op, "q", q);
    check_fits_int32(op, "Q", q.size(0));
    TORCH_CHECK_VALUE(q.size(2) >= 1, op, ": heads must have at least one element, got q of ", q.sizes());
    TORCH_CHECK_VALUE(k.dim() == 3, op, ": k must be [K, G, d], got ", k.sizes());
    check_fits_int32(op, "K", k.size(0));
    TORCH_CHECK_VALUE(k.size(1) >= 1 && q.size(1) % k.size(1) == 0, op, ": the heads of q (", q.size(1),
                      ") must be a multiple of those of k (", k.size(1), "); repeat or drop heads");
    check_token_heads(op, "k", k, k.size(0), k.size(1), in, q.scalar_type());
    check_token_heads(op, "v", in.v_KGd, k.size(0), k.size(1), in, q.scalar_type());
    check_token_range(op, "range_q", in.range_q_S2, q.size(0), "Q");
    check_token_range(op, "range_k", in.range_k_S2, k.size(0), "K");
    check_segments(op, in);
}

// The contract all backends share; throws on the first breach.
inline void check_attend(const char* op, const Attend& in, const at::Tensor& out_QHd, const at::Tensor& lse_HQ) {
    check_attend_inputs(op, in);
    const auto dtype = at_least_fp32(in.q_QHd.scalar_type());
    check_token_heads(op, "out", out_QHd, in.q_QHd.size(0), in.q_QHd.size(1), in, dtype);
    check_sizes(op, "lse", lse_HQ, {in.q_QHd.size(1), in.q_QHd.size(0)}, "[H, Q]");
    check_dtype(op, "lse", lse_HQ, dtype);
    check_same_device(op, "lse", lse_HQ, "q", in.q_QHd);
    check_contiguous(op, "lse", lse_HQ);
}

struct AttendGradients {
    const at::Tensor &dq_QHd, &dk_KGd, &dv_KGd, &dout_QHd;
};

inline void check_attend_backward(const Attend& in, const at::Tensor& out_QHd, const at::Tensor& lse_HQ,
                                  const AttendGradients& of) {
    constexpr auto kOp = "attend_backward";
    check_attend(kOp, in, out_QHd, lse_HQ);
    const auto &q = in.q_QHd, &k = in.k_KGd;
    const auto sums = at_least_fp32(q.scalar_type());
    check_token_heads(kOp, "dout", of.dout_QHd, q.size(0), q.size(1), in, q.scalar_type());
    check_token_heads(kOp, "dq", of.dq_QHd, q.size(0), q.size(1), in, sums);
    check_token_heads(kOp, "dk", of.dk_KGd, k.size(0), k.size(1), in, sums);
    check_token_heads(kOp, "dv", of.dv_KGd, k.size(0), k.size(1), in, sums);
}

void attend_cpu(at::Tensor& out_QHd, at::Tensor& lse_HQ, const at::Tensor& q_QHd, const at::Tensor& k_KGd,
                const at::Tensor& v_KGd, const at::Tensor& range_q_S2, const at::Tensor& range_k_S2, bool causal,
                double scale);
void attend_backward_cpu(at::Tensor& dq_QHd, at::Tensor& dk_KGd, at::Tensor& dv_KGd, const at::Tensor& dout_QHd,
                         const at::Tensor& q_QHd, const at::Tensor& k_KGd, const at::Tensor& v_KGd,
                         const at::Tensor& out_QHd, const at::Tensor& lse_HQ, const at::Tensor& range_q_S2,
                         const at::Tensor& range_k_S2, bool causal, double scale);

// attend_'s and attend_backward_'s contracts as operators of their own, on any device, for those who compose these of
// other operators.
void check_attend_op(const at::Tensor& out_QHd, const at::Tensor& lse_HQ, const at::Tensor& q_QHd,
                     const at::Tensor& k_KGd, const at::Tensor& v_KGd, const at::Tensor& range_q_S2,
                     const at::Tensor& range_k_S2, bool causal, double scale);
void check_attend_backward_op(const at::Tensor& dq_QHd, const at::Tensor& dk_KGd, const at::Tensor& dv_KGd,
                              const at::Tensor& dout_QHd, const at::Tensor& q_QHd, const at::Tensor& k_KGd,
                              const at::Tensor& v_KGd, const at::Tensor& out_QHd, const at::Tensor& lse_HQ,
                              const at::Tensor& range_q_S2, const at::Tensor& range_k_S2, bool causal, double scale);

}  // namespace moetrain
