#pragma once
// attend_: for every segment, out[i, h] = sum over its keys j of softmax_j(scale * <q[i, h], k[j, g]>) v[j, g], where g
// = h / (H / G), continued from the out and lse that are given: softmax is over all keys that a query has seen so far.
// Shapes: Q queries of H heads, K keys of G heads, d head size; S segments, each a range of queries and one of keys.
#include <ATen/core/Tensor.h>

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

void attend_cpu(at::Tensor& out_QHd, at::Tensor& lse_HQ, const at::Tensor& q_QHd, const at::Tensor& k_KGd,
                const at::Tensor& v_KGd, const at::Tensor& range_q_S2, const at::Tensor& range_k_S2, bool causal,
                double scale);
void attend_backward_cpu(at::Tensor& dq_QHd, at::Tensor& dk_KGd, at::Tensor& dv_KGd, const at::Tensor& dout_QHd,
                         const at::Tensor& q_QHd, const at::Tensor& k_KGd, const at::Tensor& v_KGd,
                         const at::Tensor& out_QHd, const at::Tensor& lse_HQ, const at::Tensor& range_q_S2,
                         const at::Tensor& range_k_S2, bool causal, double scale);

}  // namespace moetrain
