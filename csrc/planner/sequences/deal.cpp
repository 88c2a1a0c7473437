// Short sequences: the longest first, to the lane and round with most time left.
#include <algorithm>
#include <cmath>
#include <queue>

#include "planner/sequences/islands.h"

namespace moetrain::planner {
namespace {

class Dealer {
 public:
    explicit Dealer(Attempt& attempt) : a_(attempt) {}

    void fill() {
        double total_ms = 0, total_tokens = 0;
        for (int64_t at = a_.first_short; at < a_.problem.num_sequences; ++at) {
            if (a_.placed[a_.order[at]]) continue;
            total_ms += a_.widths.ms_of_least(a_.order[at]);
            total_tokens += static_cast<double>(a_.problem.num_tokens[a_.order[at]]);
        }
        // Sequences of more than half of what a rank holds leave room that nobody fits in: then more, shorter rounds.
        const std::vector<Island> shelves = a_.islands;
        for (const double full : {.97, .92, .86, .78, .7}) {
            a_.islands = shelves;
            a_.bins.clear();
            open_idle_lanes();
            if (total_tokens > 0) open_rounds(total_ms, total_tokens, full);
            if (deal() == 0) return;
        }
    }

 private:
    struct ByRoom {
        const std::vector<Bin>* bins;
        bool operator()(int64_t a, int64_t b) const {
            const int64_t left = (*bins)[a].tokens_left, right = (*bins)[b].tokens_left;
            return left < right || (left == right && a > b);
        }
    };

    // Lanes of shelves that no gang has.
    void open_idle_lanes() {
        for (size_t island = 0; island < a_.islands.size(); ++island) {
            for (size_t round = 0; round < a_.islands[island].rounds.size(); ++round) {
                const Round& of = a_.islands[island].rounds[round];
                for (int64_t lane = of.used; lane < a_.islands[island].lanes; ++lane)
                    a_.bins.push_back({static_cast<int32_t>(island),
                                       static_cast<int32_t>(round),
                                       lane,
                                       a_.problem.capacity,
                                       of.ms - a_.problem.costs.item_ms(),
                                       {}});
            }
        }
    }

    // Rounds of equal length on each island, up to the level at which all short sequences have room.
    void open_rounds(double total_ms, double total_tokens, double full) {
        double idle = 0;
        for (const Bin& bin : a_.bins)
            idle += std::min(bin.ms_left, total_ms / total_tokens * static_cast<double>(a_.problem.capacity));
        const double level = level_for(std::max(0.0, total_ms - idle));
        const double tokens_per_ms = total_tokens / total_ms, item_ms = a_.problem.costs.item_ms();
        for (size_t i = 0; i < a_.islands.size(); ++i) {
            Island& island = a_.islands[i];
            const double time = level - (a_.limit - island.left);
            if (time <= 0) continue;
            const auto count = static_cast<int64_t>(
                std::max(1.0, std::ceil(time * tokens_per_ms / (full * static_cast<double>(a_.problem.capacity)))));
            for (int64_t r = 0; r < count; ++r) {
                const auto round = static_cast<int32_t>(island.rounds.size());
                Round made;
                made.is_short = true;
                island.rounds.push_back(made);
                for (int64_t lane = 0; lane < island.lanes; ++lane)
                    a_.bins.push_back({static_cast<int32_t>(i),
                                       round,
                                       lane,
                                       a_.problem.capacity,
                                       time / static_cast<double>(count) - item_ms,
                                       {}});
            }
        }
    }

    // The level up to which islands have `work` left, in lanes times time.
    double level_for(double work) const {
        double low = 0, high = 0;
        for (const Island& island : a_.islands)
            high = std::max(high, a_.limit - island.left);
        const auto room = [&](double level) {
            double sum = 0;
            for (const Island& island : a_.islands)
                sum += static_cast<double>(island.lanes) * std::max(0.0, level - (a_.limit - island.left));
            return sum;
        };
        high += work / static_cast<double>(a_.problem.num_ranks) + 1e-9;
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
        std::priority_queue<int64_t, std::vector<int64_t>, ByRoom> small(ByRoom{&a_.bins});
        std::vector<std::vector<int64_t>> of_island(a_.islands.size());
        for (size_t bin = 0; bin < a_.bins.size(); ++bin) {
            push(static_cast<int64_t>(bin));
            of_island[a_.bins[bin].island].push_back(static_cast<int64_t>(bin));
        }
        for (int64_t at = a_.first_short; at < a_.problem.num_sequences; ++at) {
            const int32_t i = a_.order[at];
            if (a_.placed[i]) continue;
            const int64_t n = a_.problem.num_tokens[i];
            while (!small.empty() && a_.bins[small.top()].tokens_left >= n) {
                push(small.top());
                small.pop();
            }
            while (!open_.empty() && (is_stale(open_.top()) || a_.bins[open_.top().bin].tokens_left < n)) {
                if (!is_stale(open_.top())) small.push(open_.top().bin);
                open_.pop();
            }
            if (open_.empty()) {
                one_more_round(of_island);
                ++added;
            }
            const int64_t bin = open_.top().bin;
            open_.pop();
            a_.bins[bin].tokens_left -= n;
            a_.bins[bin].ms_left -= a_.widths.ms_of_least(i);
            a_.bins[bin].members.push_back(i);
            if (a_.bins[bin].ms_left < 0 && a_.bins[bin].members.size() == 1)
                lengthen(bin, of_island[a_.bins[bin].island]);
            if (a_.bins[bin].tokens_left > 0) push(bin);
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
    void push(int64_t bin) { open_.push({a_.bins[bin].ms_left, bin}); }
    bool is_stale(const Open& open) const { return open.ms_left != a_.bins[open.bin].ms_left; }

    // A round gets as long as a bin of it has become, at the cost of the island's other rounds of short ones: so that
    // those which are longer than such a round stand side by side, and no island has more of them than others.
    void lengthen(int64_t longer, const std::vector<int64_t>& bins) {
        const int32_t island = a_.bins[longer].island, round = a_.bins[longer].round;
        int64_t others = 0;
        for (size_t r = 0; r < a_.islands[island].rounds.size(); ++r)
            others += a_.islands[island].rounds[r].is_short && static_cast<int32_t>(r) != round;
        const double excess = -a_.bins[longer].ms_left;
        for (const int64_t bin : bins) {
            if (a_.bins[bin].round != round && (others == 0 || !a_.islands[island].rounds[a_.bins[bin].round].is_short))
                continue;
            a_.bins[bin].ms_left += a_.bins[bin].round == round ? excess : -excess / static_cast<double>(others);
            if (bin != longer && a_.bins[bin].tokens_left > 0) push(bin);
        }
    }

    // Another round on the island with most time left.
    void one_more_round(std::vector<std::vector<int64_t>>& of_island) {
        size_t where = 0;
        for (size_t i = 1; i < a_.islands.size(); ++i) {
            if (a_.islands[i].left > a_.islands[where].left) where = i;
        }
        Island& island = a_.islands[where];
        const auto round = static_cast<int32_t>(island.rounds.size());
        Round made;
        made.is_short = true;
        island.rounds.push_back(made);
        island.left -= a_.short_pack_ms;
        for (int64_t lane = 0; lane < island.lanes; ++lane) {
            const auto bin = static_cast<int64_t>(a_.bins.size());
            a_.bins.push_back({static_cast<int32_t>(where), round, lane, a_.problem.capacity, 0.0, {}});
            of_island[where].push_back(bin);
            push(bin);
        }
    }

    Attempt& a_;
    std::priority_queue<Open> open_;  // with bins that have changed since
};

}  // namespace

void deal_short(Attempt& attempt) { Dealer(attempt).fill(); }

}  // namespace moetrain::planner
