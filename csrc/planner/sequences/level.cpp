// Levels work under the round rule: as many ranks for each sequence as the step's time asks for, in rounds that take
// all ranks of a block, or of blocks that gangs join, as long.
//
// For a time T a little above the lower bound: *islands* are neighbouring blocks that share their rounds. Long
// sequences are placed first, the longest first, as *shelves*: gangs side by side on an island, each of as many ranks
// as make it about as long as the first. A shelf is one round. Then short sequences fill what is left of each island,
// in rounds of equal length and the lanes of shelves that no gang has, to whoever has most time left. Several T are
// tried.
#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>

#include "planner/sequences/islands.h"
#include "planner/sequences/planners.h"

namespace moetrain::planner {
namespace {

constexpr int64_t kFloor = 256;        // tokens of a rank of a widened gang: below, estimates are of little worth
constexpr double kShort = .3;          // of the step's time: who takes less on one rank needs no gang
constexpr double kGood = 1.005;        // of the bound, at which no longer time is tried
constexpr double kFair = 1.02;         // beyond which another way is tried
constexpr int kMostWorse = 3;          // longer times in a row that gave nothing better
constexpr int64_t kParts[] = {8, 32};  // of what a rank holds: see place_alike; the first alone on many ranks
constexpr int64_t kSmallRanks = 64, kSmallSequences = 256;  // for which islands of several widths are tried
constexpr int64_t kMostSpare = 7;
constexpr double kFineStep = .01;  // of the bound, between the times that are tried there
constexpr int kFineSteps = 50;
constexpr double kTimes[] = {1.0, 1.005, 1.01, 1.02, 1.035, 1.06, 1.1, 1.2, 1.4, 1.8, 2.5, 4.0, 8.0};  // over the bound

// What a rank full of short sequences takes, on average.
double short_pack_ms(const SequenceProblem& p, const Widths& widths) {
    double ms = 0, tokens = 0;
    for (int32_t i = 0; i < p.num_sequences; ++i) {
        if (widths.least(i) > 1) continue;
        ms += widths.ms_of_least(i), tokens += static_cast<double>(p.num_tokens[i]);
    }
    return tokens > 0 ? ms / tokens * std::min(tokens, static_cast<double>(p.capacity)) : 0;
}

int64_t first_short(const SequenceProblem& p, const Widths& widths, const std::vector<int32_t>& order, double limit) {
    int64_t at = 0;
    const auto is_short = [&](int32_t i) {
        return widths.least(i) == 1 && widths.ms_of_least(i) + p.costs.item_ms() <= kShort * limit;
    };
    while (at < p.num_sequences && !is_short(order[at]))
        ++at;
    return at;
}

double makespan(const Attempt& of) {
    std::vector<std::vector<double>> ms(of.islands.size());
    for (size_t i = 0; i < of.islands.size(); ++i) {
        for (const Round& round : of.islands[i].rounds)
            ms[i].push_back(round.is_short ? 0.0 : round.ms);
    }
    for (const Bin& bin : of.bins) {
        if (bin.members.empty()) continue;
        double sum = of.problem.costs.item_ms();
        for (const int32_t i : bin.members)
            sum += of.widths.ms_of_least(i);
        double& longest = ms[bin.island][bin.round];
        longest = std::max(longest, sum);
    }
    double most = 0;
    for (const auto& of_island : ms)
        most = std::max(most, std::accumulate(of_island.begin(), of_island.end(), 0.0));
    return most;
}

void emit(const Attempt& layout, SequencePlanMade& made) {
    for (const Island& island : layout.islands) {
        for (size_t round = 0; round < island.rounds.size(); ++round) {
            for (const Gang& gang : island.rounds[round].gangs) {
                made.items.begin(static_cast<int32_t>(round));
                made.items.add_member(gang.sequence);
                for (int64_t r = 0; r < gang.num_ranks; ++r)
                    made.items.add_rank(static_cast<int32_t>(island.first + gang.first + r));
            }
        }
    }
    for (const Bin& bin : layout.bins) {
        if (bin.members.empty()) continue;
        made.items.begin(bin.round);
        for (const int32_t i : bin.members)
            made.items.add_member(i);
        made.items.add_rank(static_cast<int32_t>(layout.islands[bin.island].first + bin.lane));
    }
}

std::vector<double> times(bool is_small) {
    std::vector<double> found(std::begin(kTimes), std::end(kTimes));
    for (int step = 1; is_small && step < kFineSteps; ++step)
        found.push_back(1 + kFineStep * step);
    std::sort(found.begin(), found.end());
    return found;
}

// The shortest plan of those that were tried.
class Best {
 public:
    Best(const SequenceProblem& p, Widths& widths, int64_t block)
        : p_(p), widths_(widths), block_(block), order_(longest_first(p)), pack_ms_(short_pack_ms(p, widths)) {}

    // Tries one of about `limit` ms: `place` puts the long sequences somewhere, or finds no room.
    template <typename Place>
    void attempt(double limit, int64_t spare, const Place& place) {
        Attempt made{p_,
                     widths_,
                     order_,
                     block_,
                     first_short(p_, widths_, order_, limit),
                     limit,
                     pack_ms_,
                     spare,
                     std::vector<char>(p_.num_sequences, 0),
                     {},
                     {}};
        if (!place(made)) return;
        deal_short(made);
        const double ms = makespan(made);
        if (plan_ && ms >= ms_) return;
        plan_.emplace(std::move(made));
        ms_ = ms;
    }

    const std::optional<Attempt>& plan() const { return plan_; }
    double ms() const { return ms_; }

 private:
    const SequenceProblem& p_;
    Widths& widths_;
    int64_t block_;
    std::vector<int32_t> order_;
    double pack_ms_;
    std::optional<Attempt> plan_;
    double ms_ = 0;
};

}  // namespace

void plan_level(const SequenceProblem& p, SequencePlanMade& made) {
    if (p.num_sequences == 0) return;
    Widths widths(p, kFloor);
    const int64_t block = p.equal_rounds ? p.num_ranks : p.block;
    const double bound = made.lower_bound_ms + p.costs.item_ms();
    const bool is_small = p.num_ranks <= kSmallRanks && p.num_sequences <= kSmallSequences;
    const int64_t most_spare = is_small ? std::min(kMostSpare, p.num_ranks / block) : 0;
    Best best(p, widths, block);
    const auto try_alike = [&] {
        for (const int64_t part : kParts) {
            if (part == kParts[0] || p.num_ranks <= kManyRanks)
                best.attempt(bound, 0, [&](Attempt& attempt) { return place_alike(attempt, part); });
        }
    };
    if (block == p.num_ranks) try_alike();
    int worse = 0;
    for (const double time : times(is_small)) {
        const double before = best.plan() ? best.ms() : std::numeric_limits<double>::infinity();
        for (int64_t spare = 0; spare <= most_spare; ++spare)
            best.attempt(bound * time, spare, place_long);
        if (!best.plan()) continue;
        worse = best.ms() < before ? 0 : worse + 1;
        if (best.ms() <= kGood * bound || (worse > kMostWorse && !is_small)) break;
    }
    // One island of all ranks is legal for any block.
    if (block < p.num_ranks && (!best.plan() || best.ms() > kFair * bound)) try_alike();
    if (!best.plan()) return plan_bytescale(p, made);
    emit(*best.plan(), made);
}

}  // namespace moetrain::planner
