#include "ops/attention/attend.h"

namespace moetrain {

void check_attend_op(const at::Tensor& out_QHd, const at::Tensor& lse_HQ, const at::Tensor& q_QHd,
                     const at::Tensor& k_KGd, const at::Tensor& v_KGd, const at::Tensor& range_q_S2,
                     const at::Tensor& range_k_S2, bool causal, double scale) {
    check_attend("attend", {q_QHd, k_KGd, v_KGd, range_q_S2, range_k_S2, causal, scale}, out_QHd, lse_HQ);
}

void check_attend_backward_op(const at::Tensor& dq_QHd, const at::Tensor& dk_KGd, const at::Tensor& dv_KGd,
                              const at::Tensor& dout_QHd, const at::Tensor& q_QHd, const at::Tensor& k_KGd,
                              const at::Tensor& v_KGd, const at::Tensor& out_QHd, const at::Tensor& lse_HQ,
                              const at::Tensor& range_q_S2, const at::Tensor& range_k_S2, bool causal, double scale) {
    check_attend_backward({q_QHd, k_KGd, v_KGd, range_q_S2, range_k_S2, causal, scale}, out_QHd, lse_HQ,
                          {dq_QHd, dk_KGd, dv_KGd, dout_QHd});
}

}  // namespace moetrain
