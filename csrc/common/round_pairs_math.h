// What round_pairs decides, for the host and the device alike. No torch header.
#pragma once
#include <cstdint>

#include "common/select_experts_math.h"

namespace moetrain {

enum class RoundRule : int8_t { kNearest, kStochastic, kNearestScore, kBalance, kUp, kDown };

// The pairs of one expert that meet at one of its holders, from all ranks that send there.
struct RoundCell {
    int64_t chosen;      // f: pairs
    int64_t candidates;  // tokens that could fill: valid, and not among the pairs

    MOETRAIN_HD int64_t over(int64_t tile) const { return chosen % tile; }          // rows to drop to go down
    MOETRAIN_HD int64_t under(int64_t tile) const { return tile - chosen % tile; }  // rows to add to go up
    // A cell of fewer tokens than a tile cannot fill one: it stays as it is rather than losing all it has.
    MOETRAIN_HD bool is_rounded(int64_t tile) const { return over(tile) != 0 && chosen + candidates >= tile; }
};

// Whether balance goes up, `surplus` being the rows added less those dropped in the cells before: if that leaves it
// closer to zero.
MOETRAIN_HD bool balance_goes_up(int64_t surplus, int64_t over, int64_t under) {
    const int64_t up = surplus + under, down = surplus - over;
    return (up < 0 ? -up : up) < (down < 0 ? -down : down);
}

// What a rule looks at beside the cell's own counts.
struct RoundEvidence {
    int64_t surplus = 0;  // balance: rows added less rows dropped in the cells before this one
    double draw = 0;      // stochastic, nearest_score: uniform in [0, 1)
    double drop_sum = 0;  // nearest_score: the scores that going down would lose
    double fill_sum = 0;  // nearest_score: the scores that going up would gain
};

// Whether a cell that is_rounded() goes up. Ties go down; so does a cell without enough candidates to go up.
MOETRAIN_HD bool goes_up(RoundRule rule, const RoundCell& cell, int64_t tile, const RoundEvidence& evidence) {
    const int64_t over = cell.over(tile), under = cell.under(tile);
    if (under > cell.candidates) return false;
    switch (rule) {
        case RoundRule::kNearest:
            return under < over;
        case RoundRule::kStochastic:
            return evidence.draw * static_cast<double>(tile) < static_cast<double>(over);
        case RoundRule::kNearestScore:
            return evidence.draw * (evidence.drop_sum + evidence.fill_sum) < evidence.drop_sum;
        case RoundRule::kBalance:
            return balance_goes_up(evidence.surplus, over, under);
        case RoundRule::kUp:
            return true;
        default:
            return false;
    }
}

// Most rows that a rule adds to one cell.
MOETRAIN_HD int64_t most_added(RoundRule rule, int64_t tile) {
    if (rule == RoundRule::kDown) return 0;
    return rule == RoundRule::kNearest ? (tile - 1) / 2 : tile - 1;
}

// One rank's offers for one expert, as int64: counts, then for each side up to `tile` entries, best offer first.
// The first side lists the chosen tokens that would be dropped first, the second the fillers that would be admitted
// first. An entry is (ordered key of the score, sequence, position of the token).
struct OfferRow {
    static constexpr int64_t kDrop = 0, kFill = 1;
    static constexpr int64_t kCounts = 4, kEntry = 3;
    static MOETRAIN_HD int64_t size(int64_t tile) { return kCounts + 2 * kEntry * tile; }

    const int64_t* data;
    int64_t tile;

    MOETRAIN_HD int64_t chosen() const { return data[0]; }
    MOETRAIN_HD int64_t candidates() const { return data[1]; }
    MOETRAIN_HD int64_t length(int64_t side) const { return data[2 + side]; }
    MOETRAIN_HD const int64_t* entry(int64_t side, int64_t i) const {
        return data + kCounts + kEntry * (side * tile + i);
    }
};

// The ordered key that a score is offered by. Whatever is no number is one and the same, below all others, so that a
// chosen token with such a score is the first to go.
template <typename Acc>
MOETRAIN_HD typename OrderedKey<Acc>::Int offer_key(Acc score) {
    return score == score ? OrderedKey<Acc>::of(score) : OrderedKey<Acc>::kTaken;
}

// The order in which tokens win: score descending, then global id (sequence, position) ascending.
MOETRAIN_HD bool wins(const int64_t* a, const int64_t* b) {
    if (a[0] != b[0]) return a[0] > b[0];
    return a[1] != b[1] ? a[1] < b[1] : a[2] < b[2];
}

// Whether token a comes before token b by global id; by index where a list breaks its promise and these are the same.
MOETRAIN_HD bool comes_before(const int64_t* token_gid_T2, int64_t a, int64_t b) {
    const int64_t *x = token_gid_T2 + 2 * a, *y = token_gid_T2 + 2 * b;
    if (x[0] != y[0]) return x[0] < y[0];
    return x[1] != y[1] ? x[1] < y[1] : a < b;
}

// The bits of counter_uniform in moetrain/ops/counter_random.py, as float64.
MOETRAIN_HD uint64_t mix64(uint64_t x) {
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9U;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBU;
    return x ^ (x >> 31);
}
MOETRAIN_HD double counter_uniform(uint64_t key, uint64_t index) {
    constexpr uint64_t kGamma = 0x9E3779B97F4A7C15U;
    const uint64_t bits = mix64(mix64(index * kGamma + key) + ((key * 0xBF58476D1CE4E5B9U) ^ kGamma));
    return static_cast<double>(bits >> 11) * 0x1p-53;
}

// The score behind an ordered key.
MOETRAIN_HD double score_of_key(int64_t key, bool is_double) {
    if (is_double) return std::bit_cast<double>(key ^ ((key >> 63) & INT64_MAX));
    const auto bits = static_cast<int32_t>(key);
    return static_cast<double>(std::bit_cast<float>(bits ^ ((bits >> 31) & INT32_MAX)));
}

// Pairs in CSR form: experts ascending, tokens ascending inside an expert.
struct PairList {
    const int32_t* token;
    const int32_t* offset;
    int64_t num_tokens;
    int64_t num_experts;
    int64_t capacity;
};

template <typename Acc>
struct OfferInput {
    PairList pairs;
    const Acc* score_TE;
    int64_t stride;  // of the scores' rows
    const int64_t* token_gid_T2;
    const bool* valid_T;  // or null
    int64_t tile;
};

struct RoundInput {
    PairList pairs;
    const int64_t* offers_WEX;
    const int32_t* offer_token_E2M;
    const int32_t* holder_WE;  // or null
    int64_t world;
    int64_t rank;
    int64_t tile;
    RoundRule rule;
    uint64_t key;
    bool is_double;  // of the offers' keys

    MOETRAIN_HD int64_t holder_of(int64_t from, int64_t e) const {
        return holder_WE == nullptr ? 0 : holder_WE[from * pairs.num_experts + e];
    }
    MOETRAIN_HD OfferRow offers_of(int64_t from, int64_t e) const {
        return {offers_WEX + (from * pairs.num_experts + e) * OfferRow::size(tile), tile};
    }
    // What expert e's pairs are in all at that holder.
    MOETRAIN_HD RoundCell cell_of(int64_t e, int64_t holder) const {
        RoundCell cell{0, 0};
        for (int64_t from = 0; from < world; ++from) {
            if (holder_of(from, e) != holder) continue;
            const OfferRow row = offers_of(from, e);
            cell.chosen += row.chosen();
            cell.candidates += row.candidates();
        }
        return cell;
    }
};

struct RoundOutput {
    int32_t* token;
    int32_t* source;
    int32_t* offset_E1;
    int64_t* added_E;
    int64_t* dropped_E;
    int64_t capacity;
};

}  // namespace moetrain
