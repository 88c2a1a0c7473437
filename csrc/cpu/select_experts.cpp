// Tokens are taken in chunks whose probabilities fit in cache. Within a chunk, threads first own tokens (scores,
// choice, weights), then columns (sums over tokens, in ascending order, in float64). So no result depends on the
// number of threads or on the size of a chunk.
#include "select_experts.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "select_experts_row.h"

namespace moetrain {
namespace {

constexpr int64_t kChunkElems = 1 << 18;
constexpr int64_t kElemsPerTask = 1 << 13;  // less is not worth a thread
constexpr int32_t kNotValid = -1;           // in place of a token's segment
constexpr int32_t kNotFinite = -2;

template <typename Acc>
struct Chunk {
    int64_t first;     // token
    Acc* prob;         // [chunk, E]
    int32_t* raw_id;   // [chunk, K], null experts under their own id
    int32_t* segment;  // [chunk]
};

template <typename Acc>
MOETRAIN_INLINE void select_tokens(const SelectOptions& o, const SelectForward<Acc>& io, const Chunk<Acc>& chunk,
                                   int64_t begin, int64_t end) {
    RowScratch<Acc> row(o);
    for (int64_t i = begin; i < end; ++i) {
        const int64_t t = chunk.first + i;
        int32_t* id = io.expert_id_TK + t * o.top_k;
        Acc* weight = io.weight_TK + t * o.top_k;
        int32_t segment = kNotValid;
        if (io.valid_T == nullptr || io.valid_T[t]) {
            load_row(io.logits.data, io.logits.dtype, t * io.logits.stride, o.num_experts, row.logit.data());
            const bool finite =
                select_row(o, io.bias_E, row, chunk.prob + i * o.num_experts, chunk.raw_id + i * o.top_k, id, weight);
            segment = !finite ? kNotFinite : io.segment_T != nullptr ? io.segment_T[t] : 0;
        }
        chunk.segment[i] = segment;
        if (segment < 0) {
            std::fill_n(id, o.top_k, -1);
            std::fill_n(weight, o.top_k, Acc(0));
        }
    }
}

template <typename Acc>
MOETRAIN_INLINE void sum_columns(const SelectOptions& o, const Chunk<Acc>& chunk, int64_t chunk_size, int64_t begin,
                                 int64_t end, double* sum_GE) {
    for (int64_t i = 0; i < chunk_size; ++i) {
        if (chunk.segment[i] < 0) continue;
        const Acc* prob = chunk.prob + i * o.num_experts;
        double* sum = sum_GE + chunk.segment[i] * o.num_experts;
        for (int64_t e = begin; e < end; ++e)
            sum[e] += static_cast<double>(prob[e]);
    }
}

template <typename Acc>
MOETRAIN_INLINE void select_tokens_backward(const SelectOptions& o, const SelectBackward<Acc>& io, int64_t begin,
                                            int64_t end) {
    const int64_t E = o.num_experts;
    RowScratch<Acc> row(o);
    std::vector<Acc> dlogit(E);
    for (int64_t t = begin; t < end; ++t) {
        bool counted = io.valid_T == nullptr || io.valid_T[t];
        if (counted) {
            load_row(io.logits.data, io.logits.dtype, t * io.logits.stride, E, row.logit.data());
            counted = all_finite(row.logit.data(), E);
        }
        if (counted) {
            const int64_t segment = io.segment_T != nullptr ? io.segment_T[t] : 0;
            std::copy_n(io.dprob_sum_GE + segment * E, E, dlogit.data());
            const int32_t* id = io.expert_id_TK + t * o.top_k;
            const Acc* dweight = io.dweight_TK + t * o.top_k;
            if (o.softmax_over_all()) {
                softmax_row_backward(o, row, id, dweight, dlogit.data());
            } else {
                lone_row_backward(o, row, id, dweight, dlogit.data());
            }
        } else {
            std::fill(dlogit.begin(), dlogit.end(), Acc(0));
        }
        store_row(dlogit.data(), E, io.dlogits_TE, io.logits.dtype, t * E);
    }
}

// The functions that exist once per instruction set: templates cannot be cloned, float is what must be fast.
MOETRAIN_CLONES void run_select(const SelectOptions& o, const SelectForward<float>& io, const Chunk<float>& chunk,
                                int64_t begin, int64_t end) {
    select_tokens(o, io, chunk, begin, end);
}
void run_select(const SelectOptions& o, const SelectForward<double>& io, const Chunk<double>& chunk, int64_t begin,
                int64_t end) {
    select_tokens(o, io, chunk, begin, end);
}
MOETRAIN_CLONES void run_sum(const SelectOptions& o, const Chunk<float>& chunk, int64_t size, int64_t begin,
                             int64_t end, double* sum_GE) {
    sum_columns(o, chunk, size, begin, end, sum_GE);
}
void run_sum(const SelectOptions& o, const Chunk<double>& chunk, int64_t size, int64_t begin, int64_t end,
             double* sum_GE) {
    sum_columns(o, chunk, size, begin, end, sum_GE);
}
MOETRAIN_CLONES void run_backward(const SelectOptions& o, const SelectBackward<float>& io, int64_t begin, int64_t end) {
    select_tokens_backward(o, io, begin, end);
}
void run_backward(const SelectOptions& o, const SelectBackward<double>& io, int64_t begin, int64_t end) {
    select_tokens_backward(o, io, begin, end);
}

template <typename Acc>
void count_choices(const SelectOptions& o, const SelectForward<Acc>& io, const Chunk<Acc>& chunk, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
        if (chunk.segment[i] == kNotFinite) *io.bad_1 = 1;
        if (chunk.segment[i] < 0) continue;
        int64_t* count = io.count_GE + chunk.segment[i] * o.num_experts;
        for (int64_t k = 0; k < o.top_k; ++k)
            ++count[chunk.raw_id[i * o.top_k + k]];
    }
}

}  // namespace

template <typename Acc>
void select_experts_kernel(const SelectOptions& o, const SelectForward<Acc>& io) {
    const int64_t E = o.num_experts;
    const int64_t chunk_size = std::clamp<int64_t>(kChunkElems / E, 1, std::max<int64_t>(o.num_tokens, 1));
    std::vector<Acc> prob(chunk_size * E);
    std::vector<int32_t> raw_id(chunk_size * o.top_k);
    std::vector<int32_t> segment(chunk_size);
    std::vector<double> sum_GE(o.num_segments * E, 0.0);
    for (int64_t first = 0; first < o.num_tokens; first += chunk_size) {
        const int64_t size = std::min(chunk_size, o.num_tokens - first);
        const Chunk<Acc> chunk{first, prob.data(), raw_id.data(), segment.data()};
        at::parallel_for(0, size, std::max<int64_t>(1, kElemsPerTask / E),
                         [&](int64_t begin, int64_t end) { run_select(o, io, chunk, begin, end); });
        at::parallel_for(0, E, std::max<int64_t>(16, 4 * kElemsPerTask / size),
                         [&](int64_t begin, int64_t end) { run_sum(o, chunk, size, begin, end, sum_GE.data()); });
        count_choices(o, io, chunk, size);
    }
    std::transform(sum_GE.begin(), sum_GE.end(), io.prob_sum_GE, [](double sum) { return static_cast<Acc>(sum); });
}

template <typename Acc>
void select_experts_backward_kernel(const SelectOptions& o, const SelectBackward<Acc>& io) {
    at::parallel_for(0, o.num_tokens, std::max<int64_t>(1, kElemsPerTask / o.num_experts),
                     [&](int64_t begin, int64_t end) { run_backward(o, io, begin, end); });
}

template void select_experts_kernel(const SelectOptions&, const SelectForward<float>&);
template void select_experts_kernel(const SelectOptions&, const SelectForward<double>&);
template void select_experts_backward_kernel(const SelectOptions&, const SelectBackward<float>&);
template void select_experts_backward_kernel(const SelectOptions&, const SelectBackward<double>&);

}  // namespace moetrain
