// Tokens are taken in chunks, cut by sizes alone. A chunk sums its own probabilities in float64 and counts its own
// choices; these are added up chunk by chunk, so that no result depends on the number of threads.
#include "cpu/routing/select_experts.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "cpu/routing/select_experts_row.h"

namespace moetrain {
namespace {

constexpr int64_t kChunkElems = 1 << 13;  // logits: fewer are not worth a thread
constexpr int64_t kMinChunkTokens = 128;  // fewer, and adding up chunks shows
constexpr int64_t kMaxChunkTokens = 1024;

// What each chunk adds to the statistics.
struct ChunkTotals {
    std::vector<double> prob_CGE;
    std::vector<int32_t> choice_CGE;
    std::vector<char> not_finite_C;
};

template <typename Acc>
MOETRAIN_INLINE bool choose_for_token(const SelectOptions& o, const SelectForward<Acc>& io, RowScratch<Acc>& row,
                                      int64_t t, double* prob_GE, int32_t* choice_GE) {
    const int64_t E = o.num_experts;
    int32_t* id = io.expert_id_TK + t * o.top_k;
    Acc* weight = io.weight_TK + t * o.top_k;
    const bool valid = io.valid_T == nullptr || io.valid_T[t];
    bool finite = true;
    if (valid) {
        load_row(io.logits.data, io.logits.dtype, t * io.logits.stride, E, row.logit.data());
        finite = select_row(o, io.bias_E, row, id, weight);
    }
    if (!valid || !finite) {
        std::fill_n(id, o.top_k, -1);
        std::fill_n(weight, o.top_k, Acc(0));
        return finite;
    }
    const int64_t first = io.segment_T != nullptr ? io.segment_T[t] * E : 0;
    double* prob_sum = prob_GE + first;
    const Acc* prob = row.prob.data();
    for (int64_t e = 0; e < E; ++e)
        prob_sum[e] += static_cast<double>(prob[e]);
    for (int64_t k = 0; k < o.top_k; ++k)
        ++choice_GE[first + row.raw_id[k]];
    return true;
}

template <typename Acc>
MOETRAIN_INLINE void select_chunks(const SelectOptions& o, const SelectForward<Acc>& io, ChunkTotals& totals,
                                   int64_t begin, int64_t end) {
    const int64_t size = select_chunk_size(o);
    const int64_t num_sums = o.num_segments * o.num_experts;
    RowScratch<Acc> row(o);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        double* prob_GE = totals.prob_CGE.data() + chunk * num_sums;
        int32_t* choice_GE = totals.choice_CGE.data() + chunk * num_sums;
        bool finite = true;
        for (int64_t t = chunk * size; t < std::min((chunk + 1) * size, o.num_tokens); ++t)
            finite = choose_for_token(o, io, row, t, prob_GE, choice_GE) && finite;
        totals.not_finite_C[chunk] = finite ? 0 : 1;
    }
}

// The gradients of a token's weights, 0 where nothing was chosen.
template <typename Acc>
MOETRAIN_INLINE const Acc* gather_dchosen(const SelectOptions& o, const SelectBackward<Acc>& io, int64_t t,
                                          const int32_t* id, Acc* dchosen) {
    const int64_t first = t * o.top_k;
    if (io.place_TK == nullptr) return io.dweight + first;
    for (int64_t k = 0; k < o.top_k; ++k)
        dchosen[k] = id[k] < 0 ? Acc(0) : io.dweight[io.place_TK[first + k]];
    return dchosen;
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
            const Acc* dweight = gather_dchosen(o, io, t, id, row.dchosen.data());
            select_row_backward(o, row, id, dweight, dlogit.data());
        } else {
            std::fill(dlogit.begin(), dlogit.end(), Acc(0));
        }
        store_row(dlogit.data(), E, io.dlogits_TE, io.logits.dtype, t * E);
    }
}

// The functions that exist once per instruction set: templates cannot be cloned, float is what must be fast.
MOETRAIN_CLONES void run_select(const SelectOptions& o, const SelectForward<float>& io, ChunkTotals& totals,
                                int64_t begin, int64_t end) {
    select_chunks(o, io, totals, begin, end);
}
void run_select(const SelectOptions& o, const SelectForward<double>& io, ChunkTotals& totals, int64_t begin,
                int64_t end) {
    select_chunks(o, io, totals, begin, end);
}
MOETRAIN_CLONES void run_backward(const SelectOptions& o, const SelectBackward<float>& io, int64_t begin, int64_t end) {
    select_tokens_backward(o, io, begin, end);
}
void run_backward(const SelectOptions& o, const SelectBackward<double>& io, int64_t begin, int64_t end) {
    select_tokens_backward(o, io, begin, end);
}

}  // namespace

int64_t select_chunk_size(const SelectOptions& o) {
    const int64_t tokens = std::clamp(kChunkElems / o.num_experts, kMinChunkTokens, kMaxChunkTokens);
    return std::max(tokens, 8 * o.num_segments);  // the sums of all chunks stay well below the logits
}

template <typename Acc>
std::vector<int32_t> select_experts_kernel(const SelectOptions& o, const SelectForward<Acc>& io) {
    const int64_t size = select_chunk_size(o);
    const int64_t num_chunks = (o.num_tokens + size - 1) / size;
    const int64_t num_sums = o.num_segments * o.num_experts;
    ChunkTotals totals{std::vector<double>(num_chunks * num_sums), std::vector<int32_t>(num_chunks * num_sums),
                       std::vector<char>(num_chunks)};
    at::parallel_for(0, num_chunks, 1, [&](int64_t begin, int64_t end) { run_select(o, io, totals, begin, end); });

    std::vector<double> prob_GE(num_sums);
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
        const double* prob = totals.prob_CGE.data() + chunk * num_sums;
        const int32_t* choice = totals.choice_CGE.data() + chunk * num_sums;
        for (int64_t i = 0; i < num_sums; ++i) {
            prob_GE[i] += prob[i];
            io.count_GE[i] += choice[i];
        }
        if (totals.not_finite_C[chunk] != 0) *io.bad_1 = 1;
    }
    std::transform(prob_GE.begin(), prob_GE.end(), io.prob_sum_GE, [](double sum) { return static_cast<Acc>(sum); });
    return std::move(totals.choice_CGE);
}

template <typename Acc>
void select_experts_backward_kernel(const SelectOptions& o, const SelectBackward<Acc>& io) {
    at::parallel_for(0, o.num_tokens, std::max<int64_t>(1, kChunkElems / o.num_experts),
                     [&](int64_t begin, int64_t end) { run_backward(o, io, begin, end); });
}

template std::vector<int32_t> select_experts_kernel(const SelectOptions&, const SelectForward<float>&);
template std::vector<int32_t> select_experts_kernel(const SelectOptions&, const SelectForward<double>&);
template void select_experts_backward_kernel(const SelectOptions&, const SelectBackward<float>&);
template void select_experts_backward_kernel(const SelectOptions&, const SelectBackward<double>&);

}  // namespace moetrain
