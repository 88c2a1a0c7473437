#include "cpu/common/tasks.h"
#include "ops/attention/causal_attention.h"
#include "ops/common/isa_dtype.h"
#include "ops/common/tensors.h"

namespace moetrain {
namespace {

attention::Heads heads(const at::Tensor& x) {
    return {.data = x.data_ptr(), .batch_stride = x.stride(0), .token_stride = x.stride(1), .head_stride = x.stride(2)};
}

attention::Problem problem_of(const CausalAttention& in) {
    check_causal_attention(in);
    check_first_values(in.first_BS);
    const auto& q = in.q_BSHd;
    attention::Problem p;
    p.length = p.most_keys = q.size(1);
    p.num_heads = q.size(2);
    p.num_key_heads = in.k_BSGd.size(2);
    p.head_dim = q.size(3);
    p.scale = in.scale;
    p.first = in.first_BS.const_data_ptr<int32_t>();
    p.q = heads(q);
    p.k = heads(in.k_BSGd);
    p.v = heads(in.v_BSGd);
    return p;
}

// One task per row and key head, each thread with one scratch for all its tasks.
void run_rows(const attention::Problem& p, int64_t num_rows, int64_t scratch_bytes,
              void (*kernel)(const attention::Problem&, void*, int64_t, int64_t)) {
    run_tasks(p.length == 0 ? 0 : num_rows * p.num_key_heads, [&] {
        const auto scratch = new_empty({scratch_bytes}, at::TensorOptions().dtype(at::kByte));
        return [&, scratch](int64_t task) {
            kernel(p, scratch.data_ptr(), task / p.num_key_heads, task % p.num_key_heads);
        };
    });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> causal_attention_cpu(const at::Tensor& q_BSHd, const at::Tensor& k_BSGd,
                                                        const at::Tensor& v_BSGd, const at::Tensor& first_BS,
                                                        double scale) {
    auto p = problem_of({q_BSHd, k_BSGd, v_BSGd, first_BS, scale});
    const auto kernels = isa::kernels_in_use(dtype_of(q_BSHd)).attention;
    auto y_BSHd = new_empty(q_BSHd.sizes(), q_BSHd.options());
    auto lse_BHS =
        new_empty({q_BSHd.size(0), p.num_heads, p.length}, q_BSHd.options().dtype(at_least_fp32(q_BSHd.scalar_type())));
    p.y = heads(y_BSHd);
    p.lse = lse_BHS.data_ptr();
    run_rows(p, q_BSHd.size(0), kernels.scratch_bytes(p), kernels.forward);
    return {y_BSHd, lse_BHS};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> causal_attention_backward_cpu(
    const at::Tensor& dy_BSHd, const at::Tensor& q_BSHd, const at::Tensor& k_BSGd, const at::Tensor& v_BSGd,
    const at::Tensor& y_BSHd, const at::Tensor& lse_BHS, const at::Tensor& first_BS, double scale) {
    const CausalAttention in{q_BSHd, k_BSGd, v_BSGd, first_BS, scale};
    auto p = problem_of(in);
    check_heads("dy", dy_BSHd, in, p.num_heads);
    check_heads("y", y_BSHd, in, p.num_heads);
    check_sizes("causal_attention", "lse", lse_BHS, {q_BSHd.size(0), p.num_heads, p.length}, "[B, H, S]");
    check_dtype("causal_attention", "lse", lse_BHS, at_least_fp32(q_BSHd.scalar_type()));
    check_contiguous("causal_attention", "lse", lse_BHS);
    const auto kernels = isa::kernels_in_use(dtype_of(q_BSHd)).attention;
    auto dq_BSHd = new_empty(q_BSHd.sizes(), q_BSHd.options());
    auto dk_BSGd = new_empty(k_BSGd.sizes(), k_BSGd.options());
    auto dv_BSGd = new_empty(v_BSGd.sizes(), v_BSGd.options());
    p.y = heads(y_BSHd);
    p.dy = heads(dy_BSHd);
    p.lse = lse_BHS.data_ptr();
    p.dq = heads(dq_BSHd);
    p.dk = heads(dk_BSGd);
    p.dv = heads(dv_BSGd);
    run_rows(p, q_BSHd.size(0), kernels.scratch_bytes(p), kernels.backward);
    return {dq_BSHd, dk_BSGd, dv_BSGd};
}

}  // namespace moetrain
