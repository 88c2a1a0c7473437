// Levels work under the round rule: as many ranks for each sequence as the step's time asks for, in rounds that take
// all ranks of a block, or of blocks that gangs join, as long.
//
// For a time T a little above the lower bound: *islands* are neighbouring blocks that share their rounds. Long
// sequences are placed first, the longest first, as *shelves*: gangs side by side on an island, each of as many ranks
// as make it about as long as the first. A shelf is one round. Then short sequences fill what is left of each island,
// in rounds of equal length and the lanes of shelves that no gang has, to whoever has most time left. Several T are
// tried.
#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <queue>
#include <utility>

#include "planner/sequences/planners.h"
#include "planner/sequences/widths.h"

namespace moetrain::planner {
namespace {

constexpr int64_t kFloor = 256;      // tokens of a rank of a widened gang: below, estimates are of little worth
constexpr double kFillsShelf = .85;  // of a shelf's length, for a gang to stand on it
constexpr double kWideEnough = .97;  // of a shelf's lanes and time that must be of use on an island that there is
constexpr int kMostTries = 48;       // sequences that a shelf looks at

struct Gang {
    int32_t sequence;
    int64_t first, num_ranks;  // lanes of the island
};

struct Round {
    double ms = 0;
    std::vector<Gang> gangs;
    int64_t used = 0;  // lanes; those from here on have packs
    bool is_short = false;
};

struct Island {
    int64_t first, lanes;
    double left;
    std::vector<Round> rounds;
};

struct Bin {  // one lane in one round, which short sequences fill
    int32_t island, round;
    int64_t lane, tokens_left;
    double ms_left;
    std::vector<int32_t> members;
};

struct Layout {
    std::vector<Island> islands;
    std::vector<Bin> bins;
    double makespan = 0;
};

class Level {
 public:
    explicit Level(const SequenceProblem& problem)
        : p_(problem),
          block_(problem.equal_rounds ? problem.num_ranks : problem.block),
          widths_(problem, kFloor),
          order_(longest_first(problem)) {}

    bool attempt(double limit, double short_share, Layout& out) {
        limit_ = limit;
        islands_.clear(), bins_.clear(), by_width_.clear();
        next_lane_ = 0;
        placed_.assign(p_.num_sequences, 0);
        first_short_ = 0;
        while (first_short_ < p_.num_sequences && !is_short(order_[first_short_], short_share))
            ++first_short_;
        // Long ones stand before short ones in the order of tokens, as time grows with these.
        for (int64_t at = 0; at < first_short_; ++at) {
            if (!placed_[order_[at]] && !place_long(at)) return false;
        }
        for (; next_lane_ < p_.num_ranks; next_lane_ += block_)
            islands_.push_back({next_lane_, block_, limit_, {}});
        fill();
        out.islands.swap(islands_);
        out.bins.swap(bins_);
        out.makespan = makespan(out);
        return true;
    }

 private:
    bool is_short(int32_t i, double share) const {
        return widths_.least(i) == 1 && widths_.ms_of_least(i) + p_.costs.item_ms() <= share * limit_;
    }

    // ---- shelves ----------------------------------------------------------------------------------------------------

    struct Shelf {
        Round round;
        double useful = 0;  // share of lanes times length
        std::vector<int32_t> members;

        bool has(int32_t sequence) const {
            return std::any_of(round.gangs.begin(), round.gangs.end(),
                               [&](const Gang& gang) { return gang.sequence == sequence; });
        }
    };

    // The shelf that begins with the sequence at `at` on `width` of an island's `lanes`.
    Shelf build(int64_t at, int64_t width, int64_t lanes) {
        Shelf shelf;
        const int32_t head = order_[at];
        double length = widths_.ms(head, width), work = least_work(head);
        shelf.round.gangs.push_back({head, 0, width});
        int64_t left = lanes - width;
        // Where most ranks are one island there is hardly another place: then also gangs that are done much earlier.
        const bool is_all = 2 * lanes > p_.num_ranks;
        for (int pass = 0; pass < (is_all ? 2 : 1); ++pass) {
            int64_t tries = 0;
            for (int64_t next = at + 1;
                 next < first_short_ && left > 0 && tries < kMostTries + std::min<int64_t>(lanes / 4, 512); ++next) {
                const int32_t i = order_[next];
                if (placed_[i] || (pass == 1 && shelf.has(i))) continue;
                ++tries;
                if (widths_.least(i) > left) continue;
                const int64_t d = widths_.within(i, length);
                if (d == 0 || d > left) continue;
                const double ms = widths_.ms(i, d);
                if (pass == 0 ? ms < kFillsShelf * length : ms * static_cast<double>(d) < short_pack_ms_) continue;
                shelf.round.gangs.push_back({i, 0, d});
                left -= d, work += least_work(i);
            }
        }
        widen(shelf.round, left);
        length = 0;
        int64_t lane = 0;
        for (Gang& gang : shelf.round.gangs) {
            gang.first = lane, lane += gang.num_ranks;
            length = std::max(length, widths_.ms(gang.sequence, gang.num_ranks));
            shelf.members.push_back(gang.sequence);
        }
        shelf.round.used = lane;
        shelf.round.ms = length + p_.costs.item_ms();
        // A lane without a gang takes one pack of short ones.
        work += static_cast<double>(lanes - lane) * std::min(length, short_pack_ms_);
        shelf.useful = work / (static_cast<double>(lanes) * length);
        return shelf;
    }

    // The longest gang gets another rank, while there is one and it gains.
    void widen(Round& round, int64_t left) {
        for (; left > 0; --left) {
            Gang* slowest = nullptr;
            double most = 0;
            for (Gang& gang : round.gangs) {
                const double ms = widths_.ms(gang.sequence, gang.num_ranks);
                if (ms > most) slowest = &gang, most = ms;
            }
            if (slowest->num_ranks >= widths_.most(slowest->sequence)) return;
            ++slowest->num_ranks;
        }
    }

    double least_work(int32_t i) const { return static_cast<double>(widths_.least(i)) * widths_.ms_of_least(i); }

    // The best shelf for the sequence on an island of `lanes` with `left` to spend; none where it is not done in that.
    bool best_on(int64_t at, int64_t lanes, double left, Shelf& best) {
        const int32_t head = order_[at];
        if (widths_.least(head) > lanes) return false;
        const int64_t least = widths_.within(head, left - p_.costs.item_ms());
        if (least == 0 || least > lanes) return false;
        const int64_t most = std::min(lanes, widths_.most(head));
        best.useful = -1;
        int64_t before = 0;
        for (const int64_t width : {least, (least + lanes) / 2, lanes / 2, lanes / 3, lanes / 4, most}) {
            if (width < least || width > most || width == before) continue;
            before = width;
            Shelf shelf = build(at, width, lanes);
            if (shelf.useful > best.useful) best = std::move(shelf);
            if (best.useful > .995) break;
        }
        return best.useful >= 0;
    }

    static constexpr int64_t kNowhere = -1, kNew = -2;

    bool place_long(int64_t at) {
        const int32_t head = order_[at];
        Shelf best, shelf;
        int64_t where = kNowhere, lanes_of_new = 0;
        int looked = 0;
        for (auto of = by_width_.lower_bound(widths_.least(head)); of != by_width_.end() && looked < 4; ++of) {
            if (of->second.empty()) continue;
            const int64_t island = of->second.top().second;
            if (!best_on(at, of->first, islands_[island].left, shelf)) continue;
            ++looked;
            if (where == kNowhere || shelf.useful > best.useful) best = shelf, where = island;
            if (best.useful > kWideEnough) break;
        }
        if (where == kNowhere || best.useful < kWideEnough) {
            const int64_t least = widths_.within(head, limit_ - p_.costs.item_ms());
            if (least > 0) {
                const int64_t blocks = (least + block_ - 1) / block_;
                for (const int64_t lanes : {blocks * block_, (blocks + 1) * block_}) {
                    if (next_lane_ + lanes > p_.num_ranks) break;
                    if (!best_on(at, lanes, limit_, shelf)) continue;
                    if (where == kNowhere || shelf.useful > best.useful)
                        best = shelf, where = kNew, lanes_of_new = lanes;
                    if (best.useful > kWideEnough) break;
                }
            }
        }
        if (where == kNowhere) return false;
        if (where == kNew) {
            islands_.push_back({next_lane_, lanes_of_new, limit_, {}});
            next_lane_ += lanes_of_new;
            where = static_cast<int64_t>(islands_.size()) - 1;
        } else {
            by_width_[islands_[where].lanes].pop();
        }
        Island& island = islands_[where];
        island.left -= best.round.ms;
        for (const int32_t i : best.members)
            placed_[i] = 1;
        island.rounds.push_back(std::move(best.round));
        by_width_[island.lanes].push({island.left, where});
        return true;
    }

    // ---- short sequences
    // ----------------------------------------------------------------------------------------------

    struct ByRoom {
        const std::vector<Bin>* bins;
        bool operator()(int64_t a, int64_t b) const {
            const int64_t left = (*bins)[a].tokens_left, right = (*bins)[b].tokens_left;
            return left < right || (left == right && a > b);
        }
    };

    void fill() {
        double total_ms = 0, total_tokens = 0;
        for (int64_t at = first_short_; at < p_.num_sequences; ++at) {
            if (placed_[order_[at]]) continue;
            total_ms += widths_.ms_of_least(order_[at]);
            total_tokens += static_cast<double>(p_.num_tokens[order_[at]]);
        }
        // Sequences of more than half of what a rank holds leave room that nobody fits in: then more, shorter rounds.
        const std::vector<Island> shelves = islands_;
        for (const double full : {.97, .92, .86, .78, .7}) {
            islands_ = shelves;
            bins_.clear();
            open_idle_lanes();
            if (total_tokens > 0) open_rounds(total_ms, total_tokens, full);
            if (deal() == 0) return;
        }
    }

    // Lanes of shelves that no gang has.
    void open_idle_lanes() {
        for (size_t island = 0; island < islands_.size(); ++island) {
            for (size_t round = 0; round < islands_[island].rounds.size(); ++round) {
                const Round& of = islands_[island].rounds[round];
                for (int64_t lane = of.used; lane < islands_[island].lanes; ++lane)
                    bins_.push_back({static_cast<int32_t>(island),
                                     static_cast<int32_t>(round),
                                     lane,
                                     p_.capacity,
                                     of.ms - p_.costs.item_ms(),
                                     {}});
            }
        }
    }

    // Rounds of equal length on each island, up to the level at which all short sequences have room.
    void open_rounds(double total_ms, double total_tokens, double full) {
        double idle = 0;
        for (const Bin& bin : bins_)
            idle += std::min(bin.ms_left, total_ms / total_tokens * static_cast<double>(p_.capacity));
        const double level = level_for(std::max(0.0, total_ms - idle));
        const double tokens_per_ms = total_tokens / total_ms, item_ms = p_.costs.item_ms();
        for (size_t i = 0; i < islands_.size(); ++i) {
            Island& island = islands_[i];
            const double time = level - (limit_ - island.left);
            if (time <= 0) continue;
            const auto count = static_cast<int64_t>(
                std::max(1.0, std::ceil(time * tokens_per_ms / (full * static_cast<double>(p_.capacity)))));
            for (int64_t r = 0; r < count; ++r) {
                const auto round = static_cast<int32_t>(island.rounds.size());
                Round made;
                made.is_short = true;
                island.rounds.push_back(made);
                for (int64_t lane = 0; lane < island.lanes; ++lane)
                    bins_.push_back({static_cast<int32_t>(i),
                                     round,
                                     lane,
                                     p_.capacity,
                                     time / static_cast<double>(count) - item_ms,
                                     {}});
            }
        }
    }

    // The level up to which islands have `work` left, in lanes times time.
    double level_for(double work) const {
        double low = 0, high = 0;
        for (const Island& island : islands_)
            high = std::max(high, limit_ - island.left);
        const auto room = [&](double level) {
            double sum = 0;
            for (const Island& island : islands_)
                sum += static_cast<double>(island.lanes) * std::max(0.0, level - (limit_ - island.left));
            return sum;
        };
        high += work / static_cast<double>(p_.num_ranks) + 1e-9;
        for (int step = 0; step < 50; ++step) {
            const double middle = (low + high) / 2;
            (room(middle) < work ? low : high) = middle;
        }
        return high;
    }

    // The longest first, to the lane and round with most time left that has room for its tokens. Returns the rounds
    // that had to be added for lack of room.
    int deal() {
        int added = 0;
        open_ = {};
        std::priority_queue<int64_t, std::vector<int64_t>, ByRoom> small(ByRoom{&bins_});
        std::vector<std::vector<int64_t>> of_island(islands_.size());
        for (size_t bin = 0; bin < bins_.size(); ++bin) {
            push(static_cast<int64_t>(bin));
            of_island[bins_[bin].island].push_back(static_cast<int64_t>(bin));
        }
        for (int64_t at = first_short_; at < p_.num_sequences; ++at) {
            const int32_t i = order_[at];
            if (placed_[i]) continue;
            const int64_t n = p_.num_tokens[i];
            while (!small.empty() && bins_[small.top()].tokens_left >= n) {
                push(small.top());
                small.pop();
            }
            while (!open_.empty() && (is_stale(open_.top()) || bins_[open_.top().bin].tokens_left < n)) {
                if (!is_stale(open_.top())) small.push(open_.top().bin);
                open_.pop();
            }
            if (open_.empty()) {
                one_more_round(of_island);
                ++added;
            }
            const int64_t bin = open_.top().bin;
            open_.pop();
            bins_[bin].tokens_left -= n;
            bins_[bin].ms_left -= widths_.ms_of_least(i);
            bins_[bin].members.push_back(i);
            if (bins_[bin].ms_left < 0 && bins_[bin].members.size() == 1) lengthen(bin, of_island[bins_[bin].island]);
            if (bins_[bin].tokens_left > 0) push(bin);
        }
        return added;
    }

    struct Open {
        double ms_left;
        int64_t bin;
        bool operator<(const Open& other) const {
            return ms_left < other.ms_left || (ms_left == other.ms_left && bin > other.bin);
        }
    };
    void push(int64_t bin) { open_.push({bins_[bin].ms_left, bin}); }
    bool is_stale(const Open& open) const { return open.ms_left != bins_[open.bin].ms_left; }

    // A round gets as long as a bin of it has become, at the cost of the island's other rounds of short ones: so that
    // those which are longer than such a round stand side by side, and no island has more of them than others.
    void lengthen(int64_t longer, const std::vector<int64_t>& bins) {
        const int32_t island = bins_[longer].island, round = bins_[longer].round;
        int64_t others = 0;
        for (size_t r = 0; r < islands_[island].rounds.size(); ++r)
            others += islands_[island].rounds[r].is_short && static_cast<int32_t>(r) != round;
        const double excess = -bins_[longer].ms_left;
        for (const int64_t bin : bins) {
            if (bins_[bin].round != round && (others == 0 || !islands_[island].rounds[bins_[bin].round].is_short))
                continue;
            bins_[bin].ms_left += bins_[bin].round == round ? excess : -excess / static_cast<double>(others);
            if (bin != longer && bins_[bin].tokens_left > 0) push(bin);
        }
    }

    // Another round on the island with most time left.
    void one_more_round(std::vector<std::vector<int64_t>>& of_island) {
        size_t where = 0;
        for (size_t i = 1; i < islands_.size(); ++i) {
            if (islands_[i].left > islands_[where].left) where = i;
        }
        Island& island = islands_[where];
        const auto round = static_cast<int32_t>(island.rounds.size());
        Round made;
        made.is_short = true;
        island.rounds.push_back(made);
        island.left -= short_pack_ms_;
        for (int64_t lane = 0; lane < island.lanes; ++lane) {
            const auto bin = static_cast<int64_t>(bins_.size());
            bins_.push_back({static_cast<int32_t>(where), round, lane, p_.capacity, 0.0, {}});
            of_island[where].push_back(bin);
            push(bin);
        }
    }

    double makespan(Layout& of) const {
        std::vector<std::vector<double>> ms(of.islands.size());
        for (size_t i = 0; i < of.islands.size(); ++i) {
            for (const Round& round : of.islands[i].rounds)
                ms[i].push_back(round.is_short ? 0.0 : round.ms);
        }
        for (const Bin& bin : of.bins) {
            if (bin.members.empty()) continue;
            double sum = p_.costs.item_ms();
            for (const int32_t i : bin.members)
                sum += widths_.ms_of_least(i);
            double& longest = ms[bin.island][bin.round];
            longest = std::max(longest, sum);
        }
        double most = 0;
        for (const auto& of_island : ms)
            most = std::max(most, std::accumulate(of_island.begin(), of_island.end(), 0.0));
        return most;
    }

 public:
    // What a full pack of the shortest sequences takes.
    void set_short_pack() {
        double ms = 0, tokens = 0;
        for (const int32_t i : order_) {
            if (widths_.least(i) > 1) continue;
            ms += widths_.ms_of_least(i), tokens += static_cast<double>(p_.num_tokens[i]);
        }
        short_pack_ms_ = tokens > 0 ? ms / tokens * std::min(tokens, static_cast<double>(p_.capacity)) : 0;
    }

 private:
    const SequenceProblem& p_;
    int64_t block_;
    Widths widths_;
    std::vector<int32_t> order_;
    double limit_ = 0, short_pack_ms_ = 0;
    int64_t next_lane_ = 0, first_short_ = 0;
    std::vector<char> placed_;
    std::vector<Island> islands_;
    std::vector<Bin> bins_;
    std::priority_queue<Open> open_;  // with bins that have changed since
    // Of each width the islands, the one with most time left first.
    using Queue = std::priority_queue<std::pair<double, int64_t>>;
    std::map<int64_t, Queue> by_width_;
};

void emit(const Layout& layout, SequencePlanMade& made) {
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

}  // namespace

void plan_level(const SequenceProblem& p, SequencePlanMade& made) {
    if (p.num_sequences == 0) return;
    made.lower_bound_ms = lower_bound_ms(p);
    Level level(p);
    level.set_short_pack();
    Layout best, now;
    best.makespan = -1;
    const double bound = made.lower_bound_ms + p.costs.item_ms();
    int since = 0;
    for (const double factor : {1.0, 1.005, 1.01, 1.02, 1.035, 1.06, 1.1, 1.2, 1.4, 1.8, 2.5, 4.0, 8.0}) {
        for (const double short_share : {.3}) {
            if (!level.attempt(bound * factor, short_share, now)) continue;
            if (best.makespan < 0 || now.makespan < best.makespan) std::swap(best, now), since = 0;
        }
        if (best.makespan >= 0 && (best.makespan <= 1.005 * bound || ++since > 3)) break;
    }
    if (best.makespan < 0) {
        plan_bytescale(p, made);
        return;
    }
    emit(best, made);
}

}  // namespace moetrain::planner
