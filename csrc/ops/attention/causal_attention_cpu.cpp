#include <algorithm>

#include "cpu/common/tasks.h"
#include "ops/attention/causal_attention.h"
#include "ops/attention/heads.h"
#include "ops/common/isa_dtype.h"
#include "ops/common/tensors.h"

namespace moetrain {
namespace {

attention::Problem problem_of(const CausalAttention& in) {
    check_causal_attention(in);
    check_documents(in.first_T, in.offset_R1);
    const auto& q = in.q_THd;
    attention::Problem p;
    p.length = q.size(0);
    p.num_heads = q.size(1);
    p.num_key_heads = in.k_TGd.size(1);
    p.head_dim = q.size(2);
    p.scale = in.scale;
    p.first = in.first_T.const_data_ptr<int32_t>();
    p.offset = in.offset_R1.const_data_ptr<int32_t>();
    for (int64_t row = 0; row + 1 < in.offset_R1.size(0); ++row)
        p.most_keys = std::max<int64_t>(p.most_keys, p.offset[row + 1] - p.offset[row]);
    p.q = token_heads(q);
    p.k = token_heads(in.k_TGd);
    p.v = token_heads(in.v_TGd);
    return p;
}

// One task per row and key head, each thread with one scratch for all its tasks.
void run_rows(const attention::Problem& p, int64_t num_rows, int64_t scratch_bytes,
              void (*kernel)(const attention::Problem&, void*, int64_t, int64_t)) {
    run_tasks(num_rows * p.num_key_heads, [&] {
        const auto scratch = new_empty({scratch_bytes}, at::TensorOptions().dtype(at::kByte));
        return [&, scratch](int64_t task) {
            kernel(p, scratch.data_ptr(), task / p.num_key_heads, task % p.num_key_heads);
        };
    });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> causal_attention_cpu(const at::Tensor& q_THd, const at::Tensor& k_TGd,
                                                        const at::Tensor& v_TGd, const at::Tensor& first_T,
                                                        const at::Tensor& offset_R1, double scale) {
    auto p = problem_of({q_THd, k_TGd, v_TGd, first_T, offset_R1, scale});
    const auto kernels = isa::kernels_in_use(dtype_of(q_THd)).attention;
    auto y_THd = new_empty(q_THd.sizes(), q_THd.options());
    auto lse_HT = new_empty({p.num_heads, p.length}, q_THd.options().dtype(at_least_fp32(q_THd.scalar_type())));
    p.y = token_heads(y_THd);
    p.lse = lse_HT.data_ptr();
    run_rows(p, offset_R1.size(0) - 1, kernels.scratch_bytes(p), kernels.forward);
    return {y_THd, lse_HT};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> causal_attention_backward_cpu(
    const at::Tensor& dy_THd, const at::Tensor& q_THd, const at::Tensor& k_TGd, const at::Tensor& v_TGd,
    const at::Tensor& y_THd, const at::Tensor& lse_HT, const at::Tensor& first_T, const at::Tensor& offset_R1,
    double scale) {
    const CausalAttention in{q_THd, k_TGd, v_TGd, first_T, offset_R1, scale};
    auto p = problem_of(in);
    check_heads("dy", dy_THd, in, p.num_heads);
    check_heads("y", y_THd, in, p.num_heads);
    check_sizes("causal_attention", "lse", lse_HT, {p.num_heads, p.length}, "[H, T]");
    check_dtype("causal_attention", "lse", lse_HT, at_least_fp32(q_THd.scalar_type()));
    check_contiguous("causal_attention", "lse", lse_HT);
    const auto kernels = isa::kernels_in_use(dtype_of(q_THd)).attention;
    auto dq_THd = new_empty(q_THd.sizes(), q_THd.options());
    auto dk_TGd = new_empty(k_TGd.sizes(), k_TGd.options());
    auto dv_TGd = new_empty(v_TGd.sizes(), v_TGd.options());
    p.y = token_heads(y_THd);
    p.dy = token_heads(dy_THd);
    p.lse = lse_HT.data_ptr();
    p.dq = token_heads(dq_THd);
    p.dk = token_heads(dk_TGd);
    p.dv = token_heads(dv_TGd);
    run_rows(p, offset_R1.size(0) - 1, kernels.scratch_bytes(p), kernels.backward);
    return {dq_THd, dk_TGd, dv_TGd};
}

}  // namespace moetrain
