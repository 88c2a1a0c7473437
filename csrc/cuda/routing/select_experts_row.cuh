// One token's row of select_experts, done by a warp; the counterpart of csrc/cpu/routing/select_experts_row.h.
// Lane l owns the columns l, l + 32, ...
#pragma once
#include <climits>

#include "common/select_experts_math.h"
#include "cuda/common/warp.cuh"

namespace moetrain {

// A warp's shared memory.
template <typename Acc>
struct WarpRow {
    using Key = typename OrderedKey<Acc>::Int;
    Acc* logit;      // [E]
    Key* key;        // [E]; the backward pass keeps d logit here
    Key* group_key;  // [groups]
    int32_t* id;     // [K], null experts under their own id
};

template <typename Acc>
__device__ __forceinline__ WarpRow<Acc> warp_row(char* memory, const SelectOptions& o) {
    WarpRow<Acc> row;
    row.logit = reinterpret_cast<Acc*>(memory);
    row.key = reinterpret_cast<typename WarpRow<Acc>::Key*>(row.logit + o.num_experts);
    row.group_key = row.key + o.num_experts;
    row.id = reinterpret_cast<int32_t*>(row.group_key + o.num_groups);
    return row;
}

template <typename Acc>
struct RowStats {
    Acc most;     // largest logit; 0 for scores that stand alone, unless all are deep: then below 0
    Acc inverse;  // 1 / sum of exp(steepness * (logit - most)), or 1 / sum of scores
};

// Loads the row into shared memory; says whether it is finite.
template <typename Acc, typename T>
__device__ __forceinline__ bool load_logits(const T* logits, int64_t size, int lane, Acc* to) {
    bool finite = true;
    for (int e = lane; e < size; e += kWarpSize) {
        const Acc x = load_as<Acc>(logits, e);
        finite = finite && x - x == 0;  // NaN for Inf and NaN
        to[e] = x;
    }
    finite = __all_sync(kWholeWarp, finite);
    __syncwarp();
    return finite;
}

// Of probabilities: softmax, which serves the others where all scores are next to nothing.
template <typename Acc>
__device__ __forceinline__ bool is_softmax(const SelectOptions& o, const RowStats<Acc>& stats) {
    return o.softmax_over_all() || stats.most < 0;
}

template <typename Acc>
__device__ __forceinline__ RowStats<Acc> row_stats(const SelectOptions& o, const Acc* logit, int lane) {
    Acc sum = 0;
    if (!o.softmax_over_all()) {
        for (int e = lane; e < o.num_experts; e += kWarpSize)
            sum += lone(o.score, logit[e]).score;
        sum = warp_sum(sum);
        if (!all_deep(o.score, sum)) return {0, Acc(1) / sum};
        sum = 0;
    }
    Acc most = logit[0];
    for (int e = lane; e < o.num_experts; e += kWarpSize)
        most = max(most, logit[e]);
    most = warp_max(most);
    for (int e = lane; e < o.num_experts; e += kWarpSize)
        sum += exp_nonpositive(steepness<Acc>(o.score) * (logit[e] - most));
    return {most, Acc(1) / warp_sum(sum)};
}

template <typename Acc>
__device__ __forceinline__ Acc prob_of(const SelectOptions& o, const RowStats<Acc>& stats, Acc logit) {
    const Acc raw = is_softmax(o, stats) ? exp_nonpositive(steepness<Acc>(o.score) * (logit - stats.most))
                                         : lone(o.score, logit).score;
    return raw * stats.inverse;
}

// What the selection's bias is added to.
template <typename Acc>
__device__ __forceinline__ Acc score_of(const SelectOptions& o, const RowStats<Acc>& stats, Acc logit) {
    if (o.score == Score::kTopkSoftmax) return logit;
    return o.score == Score::kSoftmax ? prob_of(o, stats, logit) : lone(o.score, logit).score;
}

template <typename Acc>
__device__ __forceinline__ bool fill_keys(const SelectOptions& o, const RowStats<Acc>& stats, const Acc* bias, int lane,
                                          const WarpRow<Acc>& row) {
    bool finite = true;
    for (int e = lane; e < o.num_experts; e += kWarpSize) {
        const Acc logit = row.logit[e];
        const Acc value = bias == nullptr ? logit : score_of(o, stats, logit) + bias[e];
        finite = finite && value - value == 0;
        row.key[e] = OrderedKey<Acc>::of(value);
    }
    finite = __all_sync(kWholeWarp, finite);
    __syncwarp();
    return finite;
}

// The place of the largest key, the lowest place among equals; the key is marked as taken. The same on all lanes.
template <typename Key>
__device__ __forceinline__ int take_largest(Key* key, int64_t size, Key taken, int lane) {
    Key most = taken;
    int place = INT_MAX;
    for (int e = lane; e < size; e += kWarpSize) {
        if (key[e] > most || place == INT_MAX) {  // ascending places: the first among equals stays
            most = key[e];
            place = static_cast<int>(e);
        }
    }
    const Key best = warp_max(most);
    place = warp_min(most == best ? place : INT_MAX);
    __syncwarp();
    if (lane == 0) key[place] = taken;
    __syncwarp();
    return place;
}

// Marks every key outside the groups_kept best groups as taken; a lane judges whole groups.
template <typename Acc>
__device__ __forceinline__ void mask_groups(const SelectOptions& o, const RowStats<Acc>& stats, const Acc* bias,
                                            int lane, const WarpRow<Acc>& row) {
    const int64_t size = o.group_size();
    const bool top2 = o.group_rule == GroupRule::kTop2Sum;
    for (int g = lane; g < o.num_groups; g += kWarpSize) {
        Acc best = 0;
        Acc second = 0;
        for (int i = 0; i < size; ++i) {
            const Acc logit = row.logit[g * size + i];
            const bool plain = bias == nullptr && !top2;
            // Without a bias probabilities rank deep groups as scores would, which may all be 0.
            const bool deep = bias == nullptr && is_softmax(o, stats) && !o.softmax_over_all();
            const Acc score = plain ? logit : deep ? prob_of(o, stats, logit) : score_of(o, stats, logit);
            const Acc value = bias == nullptr ? score : score + bias[g * size + i];
            if (i == 0) {
                best = value;
            } else {
                second = i == 1 ? min(best, value) : max(second, min(best, value));
                best = max(best, value);
            }
        }
        row.group_key[g] = OrderedKey<Acc>::of(top2 ? best + second : best);
    }
    __syncwarp();
    for (int i = 0; i < o.groups_kept; ++i) {
        take_largest(row.group_key, o.num_groups, OrderedKey<Acc>::kTaken, lane);
    }
    for (int e = lane; e < o.num_experts; e += kWarpSize) {
        const bool kept = row.group_key[e / size] == OrderedKey<Acc>::kTaken;
        if (!kept) row.key[e] = OrderedKey<Acc>::kTaken;
    }
    __syncwarp();
}

// What all weights of a row share.
template <typename Acc>
struct WeightStats {
    Acc most;      // largest true chosen logit
    Acc inverse;   // what raw weights are multiplied by
    bool softmax;  // over the chosen
};

template <typename Acc>
__device__ __forceinline__ Acc raw_weight(const SelectOptions& o, const RowStats<Acc>& stats,
                                          const WeightStats<Acc>& chosen, Acc logit) {
    if (chosen.softmax) return exp_nonpositive(steepness<Acc>(o.score) * (logit - chosen.most));
    return score_of(o, stats, logit);
}

template <typename Acc>
__device__ __forceinline__ Acc sum_of_raw_weights(const SelectOptions& o, const RowStats<Acc>& stats,
                                                  const WeightStats<Acc>& chosen, const Acc* logit, const int32_t* id,
                                                  int lane) {
    Acc sum = 0;
    for (int k = lane; k < o.top_k; k += kWarpSize) {
        if (id[k] < 0 || id[k] >= o.num_true()) continue;
        sum += raw_weight(o, stats, chosen, logit[id[k]]);
    }
    return warp_sum(sum);
}

// `id` may hold -1 or null experts' own ids.
template <typename Acc>
__device__ __forceinline__ WeightStats<Acc> weight_stats(const SelectOptions& o, const RowStats<Acc>& stats,
                                                         const Acc* logit, const int32_t* id, int lane) {
    WeightStats<Acc> chosen{0, 1, o.softmax_over_chosen()};
    bool any = false;
    for (int k = lane; k < o.top_k; k += kWarpSize) {
        if (id[k] < 0 || id[k] >= o.num_true()) continue;
        chosen.most = any ? max(chosen.most, logit[id[k]]) : logit[id[k]];
        any = true;
    }
    const unsigned lanes = __ballot_sync(kWholeWarp, any);
    if (lanes == 0) return chosen;
    const Acc some = __shfl_sync(kWholeWarp, chosen.most, __ffs(static_cast<int>(lanes)) - 1);
    chosen.most = warp_max(any ? chosen.most : some);
    if (!chosen.softmax && !o.renormalise) return chosen;

    Acc sum = sum_of_raw_weights(o, stats, chosen, logit, id, lane);
    if (!chosen.softmax && all_deep(o.score, sum)) {
        chosen.softmax = true;
        sum = sum_of_raw_weights(o, stats, chosen, logit, id, lane);
    }
    chosen.inverse = Acc(1) / sum;
    return chosen;
}

}  // namespace moetrain
