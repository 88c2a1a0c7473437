// Decides each expert's rows from what all ranks offer, and writes this rank's part of the rounded list.
//
// An expert to which two ranks send, tiles of 4 rows, tokens with their scores, offers from the best on:
//
//     rank   chosen              offers to drop        offers to fill
//     0      0 .9   2 .2   5 .7  2 .2   5 .7   0 .9    1 .6   3 .3   4 .05
//     1      1 .8   3 .1         3 .1   1 .8           0 .5   2 .4
//
// The 5 rows are 1 over a tile and 3 under the next. Down drops the lowest of all, rank 1's token 3: each rank reads
// that off the same offers, and rank 0 changes nothing. Up takes the highest 3 of all fillers, .6 .5 .4: rank 0 adds
// its token 1, rank 1 its tokens 0 and 2. With N = 3 pairs at rank 0 and one expert, rank 0 then writes
//
//     token   0 1 2 5
//     source  0 4 1 2    the pair's place in the old list, or N + token * experts + expert
#include "cpu/rounding/round_pairs.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

namespace moetrain {
namespace {

constexpr int64_t kExpertsPerTask = 8;

// How many of its own tokens a rank drops from, or adds to, one expert.
struct Change {
    int64_t dropped = 0;
    int64_t added = 0;
};

// The ranks that send expert e to `holder`, ascending.
std::vector<int64_t> sources_of(const RoundInput& in, int64_t e, int64_t holder) {
    std::vector<int64_t> sources;
    for (int64_t from = 0; from < in.world; ++from)
        if (in.holder_of(from, e) == holder) sources.push_back(from);
    return sources;
}

struct Taken {
    int64_t mine = 0;
    double sum = 0;  // of all scores taken, in the order taken
};

// Takes the first `count` of the sources' offers on one side, as if they were one sorted list.
Taken take(const RoundInput& in, const std::vector<int64_t>& sources, int64_t e, int64_t side, int64_t count) {
    std::vector<int64_t> used(sources.size(), 0);
    Taken taken;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t* best = nullptr;
        size_t from = 0;
        for (size_t s = 0; s < used.size(); ++s) {
            const OfferRow row = in.offers_of(sources[s], e);
            if (used[s] == row.length(side)) continue;
            const int64_t* entry = row.entry(side, used[s]);
            if (best == nullptr || (side == OfferRow::kFill ? wins(entry, best) : wins(best, entry))) {
                best = entry;
                from = s;
            }
        }
        if (best == nullptr) break;  // fillers whose scores are not finite were counted but not offered
        ++used[from];
        taken.mine += sources[from] == in.rank;
        taken.sum += score_of_key(best[0], in.is_double);
    }
    return taken;
}

Change decide(const RoundInput& in, int64_t e, int64_t surplus) {
    const int64_t holder = in.holder_of(in.rank, e);
    const RoundCell cell = in.cell_of(e, holder);
    if (!cell.is_rounded(in.tile)) return {};
    const std::vector<int64_t> sources = sources_of(in, e, holder);
    const auto taken = [&](int64_t side) {
        return take(in, sources, e, side, side == OfferRow::kDrop ? cell.over(in.tile) : cell.under(in.tile));
    };
    RoundEvidence evidence{.surplus = surplus, .draw = counter_uniform(in.key, e)};
    if (in.rule == RoundRule::kNearestScore && cell.under(in.tile) <= cell.candidates) {
        evidence.drop_sum = taken(OfferRow::kDrop).sum;
        evidence.fill_sum = taken(OfferRow::kFill).sum;
    }
    if (goes_up(in.rule, cell, in.tile, evidence)) return {.dropped = 0, .added = taken(OfferRow::kFill).mine};
    return {.dropped = taken(OfferRow::kDrop).mine, .added = 0};
}

// What balance has added, less what it has dropped, before it comes to this rank's cell of each expert. The cells of a
// group are taken by expert, then by holder.
std::vector<int64_t> surplus_before(const RoundInput& in) {
    std::vector<int64_t> before_E(in.pairs.num_experts, 0);
    if (in.rule != RoundRule::kBalance) return before_E;
    int64_t surplus = 0;
    std::vector<int64_t> holders(in.world);
    for (int64_t e = 0; e < in.pairs.num_experts; ++e) {
        holders.resize(in.world);
        for (int64_t rank = 0; rank < in.world; ++rank)
            holders[rank] = in.holder_of(rank, e);
        std::sort(holders.begin(), holders.end());
        holders.erase(std::unique(holders.begin(), holders.end()), holders.end());
        for (const int64_t holder : holders) {
            if (holder == in.holder_of(in.rank, e)) before_E[e] = surplus;
            const RoundCell cell = in.cell_of(e, holder);
            if (!cell.is_rounded(in.tile)) continue;
            const bool up = goes_up(in.rule, cell, in.tile, {.surplus = surplus});
            surplus += up ? cell.under(in.tile) : -cell.over(in.tile);
        }
    }
    return before_E;
}

// One expert's pairs, tokens ascending: the chosen that stay, and the fillers among them.
void write_expert(const RoundInput& in, const Change& change, int64_t e, int32_t* token, int32_t* source) {
    const int32_t* offered = in.offer_token_E2M + e * 2 * in.tile;
    std::vector<int32_t> dropped(offered, offered + change.dropped);
    std::vector<int32_t> added(offered + in.tile, offered + in.tile + change.added);
    std::sort(dropped.begin(), dropped.end());
    std::sort(added.begin(), added.end());
    auto drop = dropped.begin();
    auto fill = added.begin();
    const auto put_filler = [&] {
        *token++ = *fill;
        *source++ = static_cast<int32_t>(in.pairs.capacity + *fill * in.pairs.num_experts + e);
        ++fill;
    };
    for (int64_t n = in.pairs.offset[e]; n < in.pairs.offset[e + 1]; ++n) {
        const int32_t t = in.pairs.token[n];
        while (fill != added.end() && *fill < t)
            put_filler();
        if (drop != dropped.end() && *drop == t) {
            ++drop;
            continue;
        }
        *token++ = t;
        *source++ = static_cast<int32_t>(n);
    }
    while (fill != added.end())
        put_filler();
}

}  // namespace

void round_pairs_kernel(const RoundInput& in, const RoundOutput& out) {
    const int64_t num_experts = in.pairs.num_experts;
    const std::vector<int64_t> before_E = surplus_before(in);
    std::vector<Change> change_E(num_experts);
    at::parallel_for(0, num_experts, kExpertsPerTask, [&](int64_t begin, int64_t end) {
        for (int64_t e = begin; e < end; ++e)
            change_E[e] = decide(in, e, before_E[e]);
    });
    out.offset_E1[0] = 0;
    for (int64_t e = 0; e < num_experts; ++e) {
        const int64_t size = in.pairs.offset[e + 1] - in.pairs.offset[e] + change_E[e].added - change_E[e].dropped;
        out.offset_E1[e + 1] = static_cast<int32_t>(out.offset_E1[e] + size);
        out.added_E[e] = change_E[e].added;
        out.dropped_E[e] = change_E[e].dropped;
    }
    at::parallel_for(0, num_experts, kExpertsPerTask, [&](int64_t begin, int64_t end) {
        for (int64_t e = begin; e < end; ++e)
            write_expert(in, change_E[e], e, out.token + out.offset_E1[e], out.source + out.offset_E1[e]);
    });
    std::fill(out.token + out.offset_E1[num_experts], out.token + out.capacity, 0);
    std::fill(out.source + out.offset_E1[num_experts], out.source + out.capacity, 0);
}

}  // namespace moetrain
