#include <algorithm>
#include <vector>

#include "cpu/common/tasks.h"
#include "ops/attention/attend.h"
#include "ops/attention/heads.h"
#include "ops/common/isa_dtype.h"
#include "ops/common/tensors.h"

namespace moetrain {
namespace {

attention::Problem problem_of(const Attend& in, const at::Tensor& out_QHd, const at::Tensor& lse_HQ) {
    attention::Problem p;
    p.num_heads = in.q_QHd.size(1);
    p.num_key_heads = in.k_KGd.size(1);
    p.head_dim = in.q_QHd.size(2);
    p.length = in.q_QHd.size(0);
    p.range_q = in.range_q_S2.const_data_ptr<int32_t>();
    p.range_k = in.range_k_S2.const_data_ptr<int32_t>();
    for (int64_t s = 0; s < in.range_k_S2.size(0); ++s)
        p.most_keys = std::max<int64_t>(p.most_keys, p.range_k[2 * s + 1] - p.range_k[2 * s]);
    p.causal = in.causal;
    p.scale = in.scale;
    p.q = token_heads(in.q_QHd);
    p.k = token_heads(in.k_KGd);
    p.v = token_heads(in.v_KGd);
    p.y = token_heads(out_QHd);
    p.lse = lse_HQ.data_ptr();
    return p;
}

// Segments that share keys, one after the other: what one thread adds to, no other one does. Ascending.
std::vector<std::vector<int64_t>> sharing_keys(const int32_t* range_k, int64_t num_segments) {
    std::vector<std::vector<int64_t>> found;
    int32_t end = 0;
    for (const int64_t s : by_begin(range_k, num_segments)) {
        if (found.empty() || range_k[2 * s] >= end) found.emplace_back();
        found.back().push_back(s);
        end = std::max(end, range_k[2 * s + 1]);
    }
    for (auto& segments : found)
        std::sort(segments.begin(), segments.end());
    return found;
}

using Kernel = void (*)(const attention::Problem&, void*, int64_t, int64_t);

// One task per list of segments and key head, each thread with one scratch for all its tasks.
void run(const attention::Problem& p, const std::vector<std::vector<int64_t>>& lists, int64_t scratch_bytes,
         Kernel kernel) {
    run_tasks(static_cast<int64_t>(lists.size()) * p.num_key_heads, [&] {
        const auto scratch = new_empty({scratch_bytes}, at::TensorOptions().dtype(at::kByte));
        return [&, scratch](int64_t task) {
            for (const int64_t segment : lists[task / p.num_key_heads])
                kernel(p, scratch.data_ptr(), segment, task % p.num_key_heads);
        };
    });
}

}  // namespace

void attend_cpu(at::Tensor& out_QHd, at::Tensor& lse_HQ, const at::Tensor& q_QHd, const at::Tensor& k_KGd,
                const at::Tensor& v_KGd, const at::Tensor& range_q_S2, const at::Tensor& range_k_S2, bool causal,
                double scale) {
    const Attend in{q_QHd, k_KGd, v_KGd, range_q_S2, range_k_S2, causal, scale};
    check_attend("attend", in, out_QHd, lse_HQ);
    const auto p = problem_of(in, out_QHd, lse_HQ);
    const auto kernels = isa::kernels_in_use(dtype_of(q_QHd)).attention;
    std::vector<std::vector<int64_t>> each;
    for (const int64_t s : by_begin(p.range_q, range_q_S2.size(0)))
        each.push_back({s});
    run(p, each, kernels.scratch_bytes(p), kernels.forward);
}

void attend_backward_cpu(at::Tensor& dq_QHd, at::Tensor& dk_KGd, at::Tensor& dv_KGd, const at::Tensor& dout_QHd,
                         const at::Tensor& q_QHd, const at::Tensor& k_KGd, const at::Tensor& v_KGd,
                         const at::Tensor& out_QHd, const at::Tensor& lse_HQ, const at::Tensor& range_q_S2,
                         const at::Tensor& range_k_S2, bool causal, double scale) {
    const Attend in{q_QHd, k_KGd, v_KGd, range_q_S2, range_k_S2, causal, scale};
    check_attend_backward(in, out_QHd, lse_HQ, {dq_QHd, dk_KGd, dv_KGd, dout_QHd});
    auto p = problem_of(in, out_QHd, lse_HQ);
    p.dy = token_heads(dout_QHd);
    p.dq = token_heads(dq_QHd);
    p.dk = token_heads(dk_KGd);
    p.dv = token_heads(dv_KGd);
    const auto kernels = isa::kernels_in_use(dtype_of(q_QHd)).attention;
    run(p, sharing_keys(p.range_k, range_k_S2.size(0)), kernels.scratch_bytes(p), kernels.backward);
}

}  // namespace moetrain
