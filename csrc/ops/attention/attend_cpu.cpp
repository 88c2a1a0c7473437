#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/common/tasks.h"
#include "ops/attention/attend.h"
#include "ops/common/isa_dtype.h"
#include "ops/common/row_checks.h"
#include "ops/common/tensors.h"

namespace moetrain {
namespace {

constexpr auto kOp = "attend";

attention::Heads token_heads(const at::Tensor& x) {
    return {.data = x.data_ptr(), .batch_stride = 0, .token_stride = x.stride(0), .head_stride = x.stride(1)};
}

void check_token_heads(const char* name, const at::Tensor& x, int64_t tokens, int64_t heads, const Attend& in,
                       at::ScalarType dtype) {
    check_sizes(kOp, name, x, {tokens, heads, in.q_QHd.size(2)}, "[tokens, heads, d]");
    check_dtype(kOp, name, x, dtype);
    check_same_device(kOp, name, x, "q", in.q_QHd);
    check_contiguous_rows(kOp, name, x);
}

void check_range(const char* name, const at::Tensor& range_S2, int64_t tokens, const char* of) {
    TORCH_CHECK_VALUE(range_S2.dim() == 2 && range_S2.size(1) == 2, kOp, ": ", name, " must be [S, 2], got ",
                      range_S2.sizes());
    check_dtype(kOp, name, range_S2, at::kInt);
    check_contiguous(kOp, name, range_S2);
    TORCH_CHECK_VALUE(range_S2.device().is_cpu(), kOp, ": ", name, " must be on the CPU, got ", range_S2.device());
    const auto* range = range_S2.const_data_ptr<int32_t>();
    for (int64_t s = 0; s < range_S2.size(0); ++s) {
        const int32_t begin = range[2 * s], end = range[2 * s + 1];
        TORCH_CHECK_VALUE(0 <= begin && begin <= end && end <= tokens, kOp, ": ", name, "[", s,
                          "] must be a range within ", of, " = ", tokens, ", got ", begin, " to ", end);
    }
}

// Indices of the segments by the first of their queries (or keys), those without any left out.
std::vector<int64_t> by_begin(const int32_t* range, int64_t num_segments) {
    std::vector<int64_t> order;
    for (int64_t s = 0; s < num_segments; ++s) {
        if (range[2 * s] < range[2 * s + 1]) order.push_back(s);
    }
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return range[2 * a] < range[2 * b]; });
    return order;
}

void check_segments(const Attend& in) {
    const int64_t num_segments = in.range_q_S2.size(0);
    check_sizes(kOp, "range_k", in.range_k_S2, {num_segments, 2}, "[S, 2]");
    const auto* q = in.range_q_S2.const_data_ptr<int32_t>();
    const auto* k = in.range_k_S2.const_data_ptr<int32_t>();
    for (int64_t s = 0; in.causal && s < num_segments; ++s) {
        const int32_t queries = q[2 * s + 1] - q[2 * s], keys = k[2 * s + 1] - k[2 * s];
        TORCH_CHECK_VALUE(queries == keys, kOp, ": a causal segment must have as many keys as queries, got ", queries,
                          " queries and ", keys, " keys in segment ", s, "; split it, or pass causal=False");
    }
    const std::vector<int64_t> order = by_begin(q, num_segments);
    for (size_t i = 1; i < order.size(); ++i) {
        TORCH_CHECK_VALUE(q[2 * order[i - 1] + 1] <= q[2 * order[i]], kOp, ": segments must not share queries, got ",
                          q[2 * order[i - 1]], " to ", q[2 * order[i - 1] + 1], " and ", q[2 * order[i]], " to ",
                          q[2 * order[i] + 1], "; attend to their keys in two calls, the second continuing the first");
    }
}

void check_attend(const Attend& in) {
    const auto &q = in.q_QHd, &k = in.k_KGd;
    TORCH_CHECK_VALUE(q.dim() == 3, kOp, ": q must be [Q, H, d], got ", q.sizes());
    check_float(kOp, "q", q);
    check_contiguous_rows(kOp, "q", q);
    check_fits_int32(kOp, "Q", q.size(0));
    TORCH_CHECK_VALUE(q.size(2) >= 1, kOp, ": heads must have at least one element, got q of ", q.sizes());
    TORCH_CHECK_VALUE(k.dim() == 3, kOp, ": k must be [K, G, d], got ", k.sizes());
    check_fits_int32(kOp, "K", k.size(0));
    TORCH_CHECK_VALUE(k.size(1) >= 1 && q.size(1) % k.size(1) == 0, kOp, ": the heads of q (", q.size(1),
                      ") must be a multiple of those of k (", k.size(1), "); repeat or drop heads");
    check_token_heads("k", k, k.size(0), k.size(1), in, q.scalar_type());
    check_token_heads("v", in.v_KGd, k.size(0), k.size(1), in, q.scalar_type());
    check_range("range_q", in.range_q_S2, q.size(0), "Q");
    check_range("range_k", in.range_k_S2, k.size(0), "K");
    check_segments(in);
}

void check_seen(const at::Tensor& out_QHd, const at::Tensor& lse_HQ, const Attend& in) {
    const auto dtype = at_least_fp32(in.q_QHd.scalar_type());
    check_token_heads("out", out_QHd, in.q_QHd.size(0), in.q_QHd.size(1), in, dtype);
    check_sizes(kOp, "lse", lse_HQ, {in.q_QHd.size(1), in.q_QHd.size(0)}, "[H, Q]");
    check_dtype(kOp, "lse", lse_HQ, dtype);
    check_same_device(kOp, "lse", lse_HQ, "q", in.q_QHd);
    check_contiguous(kOp, "lse", lse_HQ);
}

attention::Problem problem_of(const Attend& in, const at::Tensor& out_QHd, const at::Tensor& lse_HQ) {
    check_attend(in);
    check_seen(out_QHd, lse_HQ, in);
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
    const auto p = problem_of({q_QHd, k_KGd, v_KGd, range_q_S2, range_k_S2, causal, scale}, out_QHd, lse_HQ);
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
    auto p = problem_of(in, out_QHd, lse_HQ);
    const auto sums = at_least_fp32(q_QHd.scalar_type());
    check_token_heads("dout", dout_QHd, p.length, p.num_heads, in, q_QHd.scalar_type());
    check_token_heads("dq", dq_QHd, p.length, p.num_heads, in, sums);
    check_token_heads("dk", dk_KGd, k_KGd.size(0), p.num_key_heads, in, sums);
    check_token_heads("dv", dv_KGd, k_KGd.size(0), p.num_key_heads, in, sums);
    p.dy = token_heads(dout_QHd);
    p.dq = token_heads(dq_QHd);
    p.dk = token_heads(dk_KGd);
    p.dv = token_heads(dv_KGd);
    const auto kernels = isa::kernels_in_use(dtype_of(q_QHd)).attention;
    run(p, sharing_keys(p.range_k, range_k_S2.size(0)), kernels.scratch_bytes(p), kernels.backward);
}

}  // namespace moetrain
