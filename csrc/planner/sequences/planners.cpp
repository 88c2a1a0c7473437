#include "planner/sequences/planners.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <queue>
#include <utility>

namespace moetrain::planner {
namespace {

// Blocks that gangs join, as sets with a leader each.
class JoinedBlocks {
 public:
    explicit JoinedBlocks(int64_t num_blocks) : leader_(num_blocks) { std::iota(leader_.begin(), leader_.end(), 0); }
    int64_t leader(int64_t block) {
        while (leader_[block] != block)
            block = leader_[block] = leader_[leader_[block]];
        return block;
    }
    void join(int64_t a, int64_t b) {
        a = leader(a), b = leader(b);
        leader_[std::max(a, b)] = std::min(a, b);
    }

 private:
    std::vector<int64_t> leader_;
};

double pack_ms(const SequenceProblem& p, const SequenceItems& items, const SequenceItems::Item& item) {
    double squares = 0, tokens = 0;
    for (int32_t m = 0; m < item.num_members; ++m) {
        const double n = static_cast<double>(p.num_tokens[items.members(item)[m]]);
        squares += n * n, tokens += n;
    }
    return p.costs.ms(squares, tokens, item.num_ranks) + p.costs.item_ms();
}

}  // namespace

std::vector<int32_t> longest_first(const SequenceProblem& p) {
    std::vector<int32_t> order(p.num_sequences);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return p.num_tokens[a] > p.num_tokens[b]; });
    return order;
}

std::optional<SequencePlanner> sequence_planner_of(std::string_view name) {
    if (name == "data") return SequencePlanner::kData;
    if (name == "context") return SequencePlanner::kContext;
    if (name == "bytescale") return SequencePlanner::kByteScale;
    if (name == "moetrain") return SequencePlanner::kMoetrain;
    return std::nullopt;
}

int64_t too_long(const SequenceProblem& p, SequencePlanner planner) {
    const int64_t most = planner == SequencePlanner::kData      ? 1
                         : planner == SequencePlanner::kContext ? p.gang
                                                                : p.num_ranks;
    for (int64_t i = 0; i < p.num_sequences; ++i) {
        if (!share_fits(p.num_tokens[i], most, p.capacity)) return i;
    }
    return -1;
}

void finish(const SequenceProblem& p, SequencePlanMade& made) {
    const SequenceItems& all = made.items;
    JoinedBlocks joined(p.num_ranks / p.block);
    int32_t most = 1;
    for (const auto& item : all.items()) {
        most = std::max(most, item.round + 1);
        for (int32_t r = 1; r < item.num_ranks; ++r)
            joined.join(all.ranks(item)[0] / p.block, all.ranks(item)[r] / p.block);
    }
    if (p.equal_rounds) {
        for (int64_t block = 1; block < p.num_ranks / p.block; ++block)
            joined.join(0, block);
    }
    const int64_t num_blocks = p.num_ranks / p.block;
    std::vector<int32_t> rounds(num_blocks, 1);
    for (const auto& item : all.items()) {
        int32_t& of_set = rounds[joined.leader(all.ranks(item)[0] / p.block)];
        of_set = std::max(of_set, item.round + 1);
    }
    std::vector<int64_t> first(num_blocks + 1, 0);
    for (int64_t block = 0; block < num_blocks; ++block)
        first[block + 1] = first[block] + (joined.leader(block) == block ? rounds[block] : 0);
    std::vector<double> longest(first[num_blocks], 0.0);
    for (const auto& item : all.items()) {
        double& ms = longest[first[joined.leader(all.ranks(item)[0] / p.block)] + item.round];
        ms = std::max(ms, item.ms);
    }
    made.makespan_ms = 0;
    for (int64_t block = 0; block < num_blocks; ++block) {
        const double sum = std::accumulate(longest.begin() + first[block], longest.begin() + first[block + 1], 0.0);
        made.makespan_ms = std::max(made.makespan_ms, sum);
    }
    made.rounds.resize(p.num_ranks);
    for (int64_t rank = 0; rank < p.num_ranks; ++rank)
        made.rounds[rank] = rounds[joined.leader(rank / p.block)];
}

// Each gang in turn takes the next sequences that it holds in a round.
void plan_in_order(const SequenceProblem& p, int64_t gang, SequencePlanMade& made) {
    std::vector<int64_t> held(gang, 0);
    int64_t pack = -1;
    for (int64_t i = 0; i < p.num_sequences; ++i) {
        bool fits = pack >= 0;
        for (int64_t place = 0; fits && place < gang; ++place)
            fits = held[place] + share_of(p.num_tokens[i], gang, place) <= p.capacity;
        if (!fits) {
            const int64_t num_gangs = p.num_ranks / gang, of = ++pack % num_gangs;
            made.items.begin(static_cast<int32_t>(pack / num_gangs));
            for (int64_t r = 0; r < gang; ++r)
                made.items.add_rank(static_cast<int32_t>(of * gang + r));
            std::fill(held.begin(), held.end(), 0);
        }
        made.items.add_member(static_cast<int32_t>(i));
        for (int64_t place = 0; place < gang; ++place)
            held[place] += share_of(p.num_tokens[i], gang, place);
    }
}

// ByteScale: the fewest ranks for each long sequence, best-fit packs of short ones; longest item first to the ranks
// that lag behind. Rounds are put on it afterwards.
void plan_bytescale(const SequenceProblem& p, SequencePlanMade& made) {
    struct Pack {
        std::vector<int32_t> members;
        int64_t num_ranks;
        double ms;
    };
    std::vector<Pack> packs;
    std::vector<std::pair<int64_t, int32_t>> room;  // tokens left, pack; ascending
    for (const int32_t i : longest_first(p)) {
        const int64_t n = p.num_tokens[i], d = least_ranks(n, p.num_ranks, p.capacity);
        if (d > 1) {
            packs.push_back({{i}, d, p.costs.ms(n, d) + p.costs.item_ms()});
            continue;
        }
        auto best = std::lower_bound(room.begin(), room.end(), std::pair<int64_t, int32_t>(n, -1));
        std::pair<int64_t, int32_t> into;
        if (best == room.end()) {
            into = {p.capacity, static_cast<int32_t>(packs.size())};
            packs.push_back({{}, 1, p.costs.item_ms()});
        } else {
            into = *best;
            room.erase(best);
        }
        packs[into.second].members.push_back(i);
        packs[into.second].ms += p.costs.ms(n, 1);
        into.first -= n;
        if (into.first > 0) room.insert(std::lower_bound(room.begin(), room.end(), into), into);
    }
    std::stable_sort(packs.begin(), packs.end(), [](const Pack& a, const Pack& b) { return a.ms > b.ms; });
    std::vector<int32_t> next(p.num_ranks, 0), chosen;
    using Lane = std::pair<double, int32_t>;
    std::priority_queue<Lane, std::vector<Lane>, std::greater<>> lanes;
    for (int32_t rank = 0; rank < p.num_ranks; ++rank)
        lanes.push({0.0, rank});
    for (const Pack& pack : packs) {
        chosen.clear();
        double ready = 0;
        int32_t round = 0;
        for (int64_t r = 0; r < pack.num_ranks; ++r) {
            const auto [busy, rank] = lanes.top();
            lanes.pop();
            chosen.push_back(rank);
            ready = std::max(ready, busy);
            round = std::max(round, next[rank]);
        }
        std::sort(chosen.begin(), chosen.end());
        made.items.begin(round);
        for (const int32_t i : pack.members)
            made.items.add_member(i);
        for (const int32_t rank : chosen) {
            made.items.add_rank(rank);
            next[rank] = round + 1;
            lanes.push({ready + pack.ms, rank});
        }
    }
}

SequencePlanMade plan(const SequenceProblem& p, SequencePlanner planner) {
    SequencePlanMade made;
    made.lower_bound_ms = lower_bound_ms(p);
    switch (planner) {
        case SequencePlanner::kData:
            plan_in_order(p, 1, made);
            break;
        case SequencePlanner::kContext:
            plan_in_order(p, p.gang, made);
            break;
        case SequencePlanner::kByteScale:
            plan_bytescale(p, made);
            break;
        case SequencePlanner::kMoetrain:
            plan_level(p, made);
            break;
    }
    for (auto& item : made.items.items())
        item.ms = pack_ms(p, made.items, item);
    finish(p, made);
    return made;
}

}  // namespace moetrain::planner
