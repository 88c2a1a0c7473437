// Two linear passes over the pairs of one layer and micro-batch, a few thousand to a few hundred thousand: one thread.
//
// Experts 0 and 1 are on rank 0, expert 2 is on rank 1. A token that two experts of a rank want goes there once:
//
//     expert of pair    0 0 | 1 1 | 2 2
//     token of pair     0 3 | 0 2 | 2 3
//     plan_sends
//     token_C           0 2 3 | 2 3         rows for rank 0, for rank 1
//     pair_N            0 1 2 3 | 4 5       pairs for rank 0, for rank 1
//     row_N             0 2 0 1 | 0 1       which of those rows each is
//     plan_receives, at rank 0, if rank 1 sends 2 rows, the first for expert 0 and the second for expert 1
//     row that came     0 2   0 1 | 0   1   by sender, then by expert
//     pair_P            0 1 4 | 2 3 5       by expert, then by sender
//     row_P             0 2 3 | 0 1 4       rank 1's rows follow the 3 of rank 0

#include <algorithm>
#include <numeric>
#include <vector>

#include "ops/common/tensors.h"
#include "ops/rows/plan_rows.h"

namespace moetrain {
namespace {

constexpr int32_t kNotSent = -1;

struct Sends {
    const int32_t* token;
    const int32_t* offset;
    const int32_t* rank;
    int64_t num_experts, num_tokens, num_ranks;
};

void check_values(const Sends& in, const int32_t* local, int64_t capacity, int64_t max_local) {
    constexpr auto op = "plan_sends";
    for (int64_t e = 0; e < in.num_experts; ++e) {
        TORCH_CHECK_VALUE(in.rank[e] >= 0 && in.rank[e] < in.num_ranks && local[e] >= 0 && local[e] < max_local, op,
                          ": expert ", e, " must be on a rank in [0, ", in.num_ranks, ") and one of its ", max_local,
                          " experts, got rank ", in.rank[e], " and expert ", local[e], " of it");
        TORCH_CHECK_VALUE(in.offset[e] >= 0 && in.offset[e] <= in.offset[e + 1], op,
                          ": offset must ascend from 0, got ", in.offset[e], " before ", in.offset[e + 1]);
    }
    const int32_t end = in.offset[in.num_experts];
    TORCH_CHECK_VALUE(in.offset[0] == 0 && end <= capacity, op, ": offset must begin at 0 and end at most at ",
                      capacity, ", the number of pairs, got ", in.offset[0], " and ", end);
    for (int32_t i = 0; i < end; ++i) {
        TORCH_CHECK_VALUE(in.token[i] >= 0 && in.token[i] < in.num_tokens, op, ": tokens must be in [0, ",
                          in.num_tokens, "), got ", in.token[i], " at position ", i);
    }
}

// Numbers the rows of each destination in the order of their tokens: row_of[w * T + t], or kNotSent.
std::vector<int32_t> number_rows(const Sends& in, int32_t* token_out, int64_t* counts, int64_t counts_stride) {
    std::vector<int32_t> row_of(in.num_ranks * in.num_tokens, kNotSent);
    for (int64_t e = 0; e < in.num_experts; ++e) {
        int32_t* mine = row_of.data() + in.rank[e] * in.num_tokens;
        for (int32_t i = in.offset[e]; i < in.offset[e + 1]; ++i)
            mine[in.token[i]] = 0;
    }
    for (int64_t w = 0; w < in.num_ranks; ++w) {
        int32_t* mine = row_of.data() + w * in.num_tokens;
        int32_t num_rows = 0;
        for (int64_t t = 0; t < in.num_tokens; ++t) {
            if (mine[t] == kNotSent) continue;
            mine[t] = num_rows++;
            *token_out++ = static_cast<int32_t>(t);
        }
        counts[w * counts_stride] = num_rows;
    }
    return row_of;
}

}  // namespace

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> plan_sends_cpu(
    const at::Tensor& token_N, const at::Tensor& offset_E1, const at::Tensor& rank_E, const at::Tensor& local_E,
    const at::Tensor& bad_1, int64_t num_tokens, int64_t num_ranks, int64_t max_local) {
    check_plan_sends(token_N, offset_E1, rank_E, local_E, bad_1, num_tokens, num_ranks, max_local);
    const Sends in{token_N.const_data_ptr<int32_t>(),
                   offset_E1.const_data_ptr<int32_t>(),
                   rank_E.const_data_ptr<int32_t>(),
                   rank_E.size(0),
                   num_tokens,
                   num_ranks};
    const auto* local = local_E.const_data_ptr<int32_t>();
    check_values(in, local, token_N.size(0), max_local);

    auto token_C = new_empty({std::min(token_N.size(0), num_ranks * num_tokens)}, token_N.options());
    auto pair_N = new_empty_like(token_N);
    auto row_N = new_empty_like(token_N);
    auto counts_WK = new_zeros({num_ranks, 2 + max_local}, token_N.options().dtype(at::kLong));
    auto* counts = counts_WK.mutable_data_ptr<int64_t>();
    const int64_t stride = 2 + max_local;
    const auto row_of = number_rows(in, token_C.mutable_data_ptr<int32_t>(), counts, stride);

    std::vector<int64_t> place(num_ranks + 1, 0);  // where the next pair of each destination goes
    for (int64_t e = 0; e < in.num_experts; ++e) {
        const int64_t size = in.offset[e + 1] - in.offset[e];
        counts[in.rank[e] * stride + 2 + local[e]] += size;
        place[in.rank[e] + 1] += size;
    }
    std::partial_sum(place.begin(), place.end(), place.begin());
    auto* pair = pair_N.mutable_data_ptr<int32_t>();
    auto* row = row_N.mutable_data_ptr<int32_t>();
    for (int64_t e = 0; e < in.num_experts; ++e) {
        const int32_t* mine = row_of.data() + in.rank[e] * num_tokens;
        int64_t& next = place[in.rank[e]];
        for (int32_t i = in.offset[e]; i < in.offset[e + 1]; ++i, ++next) {
            pair[next] = i;
            row[next] = mine[in.token[i]];
        }
    }
    for (int64_t w = 0; w < num_ranks; ++w)
        counts[w * stride + 1] = *bad_1.const_data_ptr<int32_t>();
    return {token_C, pair_N, row_N, counts_WK};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> plan_receives_cpu(const at::Tensor& row_P, const at::Tensor& counts_WK,
                                                                 int64_t num_local) {
    check_plan_receives(row_P, counts_WK, num_local);
    const auto* counts = counts_WK.const_data_ptr<int64_t>();
    const int64_t num_ranks = counts_WK.size(0), stride = counts_WK.size(1);
    std::vector<int64_t> place(num_local + 1, 0);  // of the next pair of each expert
    int64_t num_pairs = 0;
    for (int64_t w = 0; w < num_ranks; ++w) {
        for (int64_t e = 0; e < num_local; ++e) {
            const int64_t size = counts[w * stride + 2 + e];
            TORCH_CHECK_VALUE(size >= 0, "plan_receives: counts must be at least 0, got ", size, " from rank ", w);
            place[e + 1] += size;
            num_pairs += size;
        }
    }
    TORCH_CHECK_VALUE(num_pairs == row_P.size(0), "plan_receives: counts announce ", num_pairs, " pairs, but ",
                      row_P.size(0), " came; give the counts of the same exchange");
    std::partial_sum(place.begin(), place.end(), place.begin());
    auto offset_e1 = new_empty({num_local + 1}, row_P.options());
    std::copy(place.begin(), place.end(), offset_e1.mutable_data_ptr<int32_t>());

    auto pair_P = new_empty_like(row_P);
    auto placed_P = new_empty_like(row_P);
    const auto* sent_row = row_P.const_data_ptr<int32_t>();
    auto* pair = pair_P.mutable_data_ptr<int32_t>();
    auto* placed = placed_P.mutable_data_ptr<int32_t>();
    int32_t from = 0, first_row = 0;
    for (int64_t w = 0; w < num_ranks; ++w) {
        for (int64_t e = 0; e < num_local; ++e) {
            for (int64_t i = 0; i < counts[w * stride + 2 + e]; ++i, ++from) {
                pair[place[e]] = from;
                placed[place[e]++] = first_row + sent_row[from];
            }
        }
        first_row += static_cast<int32_t>(counts[w * stride]);
    }
    return {pair_P, placed_P, offset_e1};
}

}  // namespace moetrain
