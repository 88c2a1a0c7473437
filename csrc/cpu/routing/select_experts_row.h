// One token's row of select_experts: scores, choice, weights, and their gradient. Loops are written for compilers
// to vectorise; sums, which
// they may not reorder, run over 16 lanes on every instruction set.
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/select_experts_math.h"
#include "cpu/common/rows.h"
#include "cpu/routing/top_k_row.h"

namespace moetrain {

template <typename Acc>
struct RowScratch {
    explicit RowScratch(const SelectOptions& o)
        : logit(o.num_experts),
          score(o.num_experts),
          prob(o.num_experts),
          log_slope(o.num_experts),
          biased(o.num_experts),
          key(padded_for_top_k(o.num_experts), OrderedKey<Acc>::kTaken),
          group_key(o.num_groups),
          raw_id(o.top_k),
          chosen(o.top_k),
          dchosen(o.top_k) {}
    std::vector<Acc> logit, score, prob, log_slope, biased;
    std::vector<typename OrderedKey<Acc>::Int> key, group_key;
    std::vector<int32_t> raw_id;  // null experts under their own id
    std::vector<Acc> chosen, dchosen;
};

// GNU vectors, which the compiler fits to each instruction set.
template <typename Acc, int kLanes>
struct LanesOf {
    typedef Acc Type __attribute__((vector_size(sizeof(Acc) * kLanes)));
};
constexpr int64_t kRowLanes = 16;
template <typename Acc, int kLanes>
using Lanes = typename LanesOf<Acc, kLanes>::Type;

template <typename Vector, typename Acc>
MOETRAIN_INLINE void load_lanes(const Acc* x, Vector& lanes) {
    std::memcpy(&lanes, x, sizeof lanes);
}

// The sum of x[i] * y[i], or of x[i] where y is null.
template <bool kDot, typename Acc>
MOETRAIN_INLINE Acc sum_products(const Acc* x, [[maybe_unused]] const Acc* y, int64_t size) {
    Lanes<Acc, kRowLanes> sum = {};
    int64_t i = 0;
    for (; i + kRowLanes <= size; i += kRowLanes) {
        Lanes<Acc, kRowLanes> a;
        load_lanes(x + i, a);
        if constexpr (kDot) {
            Lanes<Acc, kRowLanes> b;
            load_lanes(y + i, b);
            a *= b;
        }
        sum += a;
    }
    Acc total = 0;
    if (i > 0) {
        const Lanes<Acc, 8> a = __builtin_shufflevector(sum, sum, 0, 1, 2, 3, 4, 5, 6, 7) +
                                __builtin_shufflevector(sum, sum, 8, 9, 10, 11, 12, 13, 14, 15);
        const Lanes<Acc, 4> b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
        total = (b[0] + b[2]) + (b[1] + b[3]);
    }
    for (; i < size; ++i)
        total += kDot ? x[i] * y[i] : x[i];
    return total;
}

template <typename Acc>
MOETRAIN_INLINE Acc sum_row(const Acc* x, int64_t size) {
    return sum_products<false, Acc>(x, nullptr, size);
}

template <typename Acc>
MOETRAIN_INLINE Acc dot_rows(const Acc* x, const Acc* y, int64_t size) {
    return sum_products<true, Acc>(x, y, size);
}

template <typename Acc>
MOETRAIN_INLINE Acc max_row(const Acc* x, int64_t size) {
    Acc most = x[0];
    int64_t i = 0;
    if (size >= kRowLanes) {
        Lanes<Acc, kRowLanes> best;
        load_lanes(x, best);
        for (i = kRowLanes; i + kRowLanes <= size; i += kRowLanes) {
            Lanes<Acc, kRowLanes> a;
            load_lanes(x + i, a);
            best = best > a ? best : a;
        }
        const Lanes<Acc, 8> low = __builtin_shufflevector(best, best, 0, 1, 2, 3, 4, 5, 6, 7);
        const Lanes<Acc, 8> high = __builtin_shufflevector(best, best, 8, 9, 10, 11, 12, 13, 14, 15);
        const Lanes<Acc, 8> half = low > high ? low : high;
        const Lanes<Acc, 4> left = __builtin_shufflevector(half, half, 0, 1, 2, 3);
        const Lanes<Acc, 4> right = __builtin_shufflevector(half, half, 4, 5, 6, 7);
        const Lanes<Acc, 4> quarter = left > right ? left : right;
        most = std::max(std::max(quarter[0], quarter[2]), std::max(quarter[1], quarter[3]));
    }
    for (; i < size; ++i)
        most = std::max(most, x[i]);
    return most;
}

template <typename Acc>
MOETRAIN_INLINE bool all_finite(const Acc* x, int64_t size) {
    int breaches = 0;
    for (int64_t i = 0; i < size; ++i)
        breaches += (x[i] - x[i] == 0) ? 0 : 1;  // NaN for Inf and NaN
    return breaches == 0;
}

// Shares of a row: raw[e] * inverse.
template <typename Acc>
struct Shares {
    const Acc* raw;
    Acc inverse;
};

// Those of e^(steepness * logit).
template <typename Acc>
MOETRAIN_INLINE Shares<Acc> softmax_row(const Acc* logit, int64_t size, Acc* raw, Acc steepness = 1) {
    const Acc most = max_row(logit, size);
    for (int64_t i = 0; i < size; ++i)
        raw[i] = exp_nonpositive(steepness * (logit[i] - most));
    return {raw, Acc(1) / sum_row(raw, size)};
}

// Fills the scores and, where they are wanted, their slopes; returns the scores' sum.
template <bool kSlopes, typename Acc>
MOETRAIN_INLINE Acc lone_scores_row(Score kind, const Acc* logit, int64_t size, Acc* score, Acc* log_slope) {
    const auto each = [&](const auto& lone_of) {
        for (int64_t i = 0; i < size; ++i) {
            const LoneScore<Acc> lone = lone_of(logit[i]);
            score[i] = lone.score;
            if constexpr (kSlopes) log_slope[i] = lone.log_slope;
        }
    };
    if (kind == Score::kSigmoid) {
        each([](Acc x) __attribute__((always_inline)) { return lone_sigmoid(x); });
    } else {
        each([](Acc x) __attribute__((always_inline)) { return lone_root(x); });
    }
    return sum_row(score, size);
}

// The probabilities of the logits in `row.logit`. Scores that stand alone are left in `row.score`, their slopes, where
// they are wanted, in `row.log_slope`.
template <bool kSlopes, typename Acc>
MOETRAIN_INLINE Shares<Acc> probabilities_row(const SelectOptions& o, RowScratch<Acc>& row) {
    const Acc* logit = row.logit.data();
    if (o.softmax_over_all()) return softmax_row(logit, o.num_experts, row.prob.data());
    Acc* score = row.score.data();
    const Acc sum = lone_scores_row<kSlopes>(o.score, logit, o.num_experts, score, row.log_slope.data());
    if (!all_deep(o.score, sum)) return {score, Acc(1) / sum};
    return softmax_row(logit, o.num_experts, row.prob.data(), steepness<Acc>(o.score));
}

// The place of the largest key, the lowest place among equals; the key is marked as taken.
template <typename Int>
MOETRAIN_INLINE int64_t take_largest(Int* key, int64_t size) {
    Int most = std::numeric_limits<Int>::min();
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < size; ++i)
        most = key[i] > most ? key[i] : most;
    Int place = std::numeric_limits<Int>::max();
#pragma omp simd reduction(min : place)
    for (int64_t i = 0; i < size; ++i) {
        const Int candidate = key[i] == most ? static_cast<Int>(i) : std::numeric_limits<Int>::max();
        place = candidate < place ? candidate : place;
    }
    key[place] = std::numeric_limits<Int>::min();
    return place;
}

// The places of the top_k largest keys, which are left in no order.
template <typename Int>
MOETRAIN_INLINE void take_top_k(Int* key, int64_t size, int64_t top_k, int32_t* place) {
    if constexpr (std::is_same_v<Int, int32_t>) {
        if (top_k <= kMaxTopKDepth) return top_k_row(key, size, top_k, place);
    }
    for (int64_t k = 0; k < top_k; ++k)
        place[k] = static_cast<int32_t>(take_largest(key, size));
}

template <typename Acc>
MOETRAIN_INLINE Acc group_score(GroupRule rule, const Acc* value, int64_t size) {
    Acc best = value[0];
    Acc second = size > 1 ? std::numeric_limits<Acc>::lowest() : Acc(0);
    for (int64_t i = 1; i < size; ++i) {
        second = std::max(second, std::min(best, value[i]));
        best = std::max(best, value[i]);
    }
    return rule == GroupRule::kTop2Sum ? best + second : best;
}

// Marks every key outside the groups_kept best groups as taken.
template <typename Acc>
MOETRAIN_INLINE void mask_groups(const SelectOptions& o, const Acc* value, RowScratch<Acc>& row) {
    const int64_t size = o.group_size();
    for (int64_t g = 0; g < o.num_groups; ++g) {
        row.group_key[g] = OrderedKey<Acc>::of(group_score(o.group_rule, value + g * size, size));
    }
    for (int64_t i = 0; i < o.groups_kept; ++i)
        take_largest(row.group_key.data(), o.num_groups);
    for (int64_t g = 0; g < o.num_groups; ++g) {
        if (row.group_key[g] == OrderedKey<Acc>::kTaken) continue;  // taken: this group is kept
        std::fill_n(row.key.data() + g * size, size, OrderedKey<Acc>::kTaken);
    }
}

// Weights of the chosen ids (-1: null) before the scale, of what scores_row left in `row`.
template <typename Acc>
MOETRAIN_INLINE void weigh_chosen(const SelectOptions& o, const RowScratch<Acc>& row, const int32_t* id, Acc* weight) {
    const Acc* logit = row.logit.data();
    if (!o.softmax_over_chosen()) {
        const Acc* score = o.softmax_over_all() ? row.prob.data() : row.score.data();
        Acc sum = 0;
        for (int64_t k = 0; k < o.top_k; ++k) {
            weight[k] = id[k] < 0 ? Acc(0) : score[id[k]];
            sum += weight[k];
        }
        if (!o.renormalise) return;
        if (!all_deep(o.score, sum)) {
            for (int64_t k = 0; k < o.top_k; ++k)
                weight[k] /= sum;
            return;
        }
    }
    Acc most = std::numeric_limits<Acc>::lowest();
    for (int64_t k = 0; k < o.top_k; ++k) {
        weight[k] = id[k] < 0 ? std::numeric_limits<Acc>::lowest() : logit[id[k]];
        most = weight[k] > most ? weight[k] : most;
    }
    const auto steep = steepness<Acc>(o.score);
    for (int64_t k = 0; k < o.top_k; ++k)
        weight[k] = id[k] < 0 ? Acc(0) : exp_nonpositive(steep * (weight[k] - most));
    Acc sum = 0;
    for (int64_t k = 0; k < o.top_k; ++k)
        sum += weight[k];
    if (sum == 0) return;  // all chosen are null
    for (int64_t k = 0; k < o.top_k; ++k)
        weight[k] /= sum;
}

// Chooses and weighs for the logits in `row.logit`; leaves the row's probabilities and raw ids in `row`.
// Returns false, with nothing chosen, where a logit or a biased score is not finite.
template <typename Acc>
MOETRAIN_INLINE bool select_row(const SelectOptions& o, const Acc* bias, RowScratch<Acc>& row, int32_t* id,
                                Acc* weight) {
    const int64_t E = o.num_experts;
    const Acc* logit = row.logit.data();
    if (!all_finite(logit, E)) return false;
    const Shares<Acc> shares = probabilities_row</*kSlopes=*/false>(o, row);
    Acc* prob = row.prob.data();
    for (int64_t e = 0; e < E; ++e)
        prob[e] = shares.raw[e] * shares.inverse;
    // Deep scores may all be 0; where there is no bias to add to them, probabilities rank groups alike.
    const bool is_lone = !o.softmax_over_all() && (shares.raw == row.score.data() || bias != nullptr);
    const Acc* ranked_by = o.score == Score::kTopkSoftmax ? logit : is_lone ? row.score.data() : prob;
    const Acc* key_of = logit;
    if (bias != nullptr) {
        for (int64_t e = 0; e < E; ++e)
            row.biased[e] = ranked_by[e] + bias[e];
        ranked_by = key_of = row.biased.data();
        if (!all_finite(key_of, E)) return false;
    }
    for (int64_t e = 0; e < E; ++e)
        row.key[e] = OrderedKey<Acc>::of(key_of[e]);
    if (o.groups_kept < o.num_groups) mask_groups(o, o.group_rule == GroupRule::kMax ? key_of : ranked_by, row);
    take_top_k(row.key.data(), E, o.top_k, row.raw_id.data());
    const auto num_true = static_cast<int32_t>(o.num_true());
    for (int64_t k = 0; k < o.top_k; ++k)
        id[k] = row.raw_id[k] < num_true ? row.raw_id[k] : -1;
    weigh_chosen(o, row, id, weight);
    const auto scale = static_cast<Acc>(o.scale);
    for (int64_t k = 0; k < o.top_k; ++k)
        weight[k] *= scale;
    return true;
}

// d logit of the logits in `row.logit`. `dlogit` comes in holding d prob from the statistics.
template <typename Acc>
MOETRAIN_INLINE void select_row_backward(const SelectOptions& o, RowScratch<Acc>& row, const int32_t* id,
                                         const Acc* dweight, Acc* dlogit) {
    const int64_t E = o.num_experts;
    const auto scale = static_cast<Acc>(o.scale);
    const Shares<Acc> shares = probabilities_row</*kSlopes=*/true>(o, row);
    const Acc* log_slope = o.softmax_over_all() ? nullptr : row.log_slope.data();  // null: 1
    if (o.weighs_by_probability()) {
        for (int64_t k = 0; k < o.top_k; ++k) {
            if (id[k] >= 0) dlogit[id[k]] += scale * dweight[k];
        }
    }
    const Acc dot = dot_rows(shares.raw, dlogit, E) * shares.inverse;
    if (log_slope == nullptr) {
        for (int64_t e = 0; e < E; ++e)
            dlogit[e] = shares.raw[e] * shares.inverse * (dlogit[e] - dot);
    } else {
        for (int64_t e = 0; e < E; ++e)
            dlogit[e] = shares.raw[e] * shares.inverse * log_slope[e] * (dlogit[e] - dot);
    }
    if (o.weighs_by_probability()) return;

    // By log(score), as above: scores that vanish would make quotients of nothing.
    Acc* weight = row.chosen.data();
    weigh_chosen(o, row, id, weight);
    Acc chosen_dot = 0;
    if (o.renormalise || o.softmax_over_chosen()) {
        for (int64_t k = 0; k < o.top_k; ++k) {
            if (id[k] >= 0) chosen_dot += weight[k] * dweight[k];
        }
    }
    for (int64_t k = 0; k < o.top_k; ++k) {
        if (id[k] < 0) continue;
        const Acc slope = log_slope == nullptr ? Acc(1) : log_slope[id[k]];
        dlogit[id[k]] += scale * slope * weight[k] * (dweight[k] - chosen_dot);
    }
}

}  // namespace moetrain
