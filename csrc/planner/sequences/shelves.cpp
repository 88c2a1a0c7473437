// Long sequences: gangs side by side on an island, each of as many ranks as make it about as long as the first.
#include <algorithm>
#include <map>
#include <queue>
#include <utility>

#include "planner/sequences/islands.h"

namespace moetrain::planner {
namespace {

constexpr double kFillsShelf = .85;  // of a shelf's length, for a gang to stand on it
constexpr double kWideEnough = .97;  // of a shelf's lanes and time that must be of use on an island that there is
constexpr int kMostTries = 48;       // sequences that a shelf looks at

class Shelves {
 public:
    explicit Shelves(Attempt& attempt) : a_(attempt) {}

    bool place_all() {
        // Long ones stand before short ones in the order of tokens, as time grows with these.
        for (int64_t at = 0; at < a_.first_short; ++at) {
            if (!a_.placed[a_.order[at]] && !place(at)) return false;
        }
        for (; next_lane_ < a_.problem.num_ranks; next_lane_ += a_.block)
            a_.islands.push_back({next_lane_, a_.block, a_.limit, {}});
        return true;
    }

 private:
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
        const int32_t head = a_.order[at];
        double length = a_.widths.ms(head, width), work = least_work(head);
        shelf.round.gangs.push_back({head, 0, width});
        int64_t left = lanes - width;
        // Where most ranks are one island there is hardly another place: then also gangs that are done much earlier.
        const bool is_all = 2 * lanes > a_.problem.num_ranks;
        for (int pass = 0; pass < (is_all ? 2 : 1); ++pass) {
            int64_t tries = 0;
            for (int64_t next = at + 1;
                 next < a_.first_short && left > 0 && tries < kMostTries + std::min<int64_t>(lanes / 4, 512); ++next) {
                const int32_t i = a_.order[next];
                if (a_.placed[i] || (pass == 1 && shelf.has(i))) continue;
                ++tries;
                if (a_.widths.least(i) > left) continue;
                const int64_t d = a_.widths.within(i, length);
                if (d == 0 || d > left) continue;
                const double ms = a_.widths.ms(i, d);
                if (pass == 0 ? ms < kFillsShelf * length : ms * static_cast<double>(d) < a_.short_pack_ms) continue;
                shelf.round.gangs.push_back({i, 0, d});
                left -= d, work += least_work(i);
            }
        }
        widen(shelf.round, left);
        length = 0;
        int64_t lane = 0;
        for (Gang& gang : shelf.round.gangs) {
            gang.first = lane, lane += gang.num_ranks;
            length = std::max(length, a_.widths.ms(gang.sequence, gang.num_ranks));
            shelf.members.push_back(gang.sequence);
        }
        shelf.round.used = lane;
        shelf.round.ms = length + a_.problem.costs.item_ms();
        // A lane without a gang takes one pack of short ones.
        work += static_cast<double>(lanes - lane) * std::min(length, a_.short_pack_ms);
        shelf.useful = work / (static_cast<double>(lanes) * length);
        return shelf;
    }

    // The longest gang gets another rank, while there is one and it gains.
    void widen(Round& round, int64_t left) {
        for (; left > 0; --left) {
            Gang* slowest = nullptr;
            double most = 0;
            for (Gang& gang : round.gangs) {
                const double ms = a_.widths.ms(gang.sequence, gang.num_ranks);
                if (ms > most) slowest = &gang, most = ms;
            }
            if (slowest->num_ranks >= a_.widths.most(slowest->sequence)) return;
            ++slowest->num_ranks;
        }
    }

    double least_work(int32_t i) const { return static_cast<double>(a_.widths.least(i)) * a_.widths.ms_of_least(i); }

    // The best shelf for the sequence on an island of `lanes` with `left` to spend; none where it is not done in that.
    bool best_on(int64_t at, int64_t lanes, double left, Shelf& best) {
        const int32_t head = a_.order[at];
        if (a_.widths.least(head) > lanes) return false;
        const int64_t least = a_.widths.within(head, left - a_.problem.costs.item_ms());
        if (least == 0 || least > lanes) return false;
        const int64_t most = std::min(lanes, a_.widths.most(head));
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

    // The sequence, and what goes with it, on the island where most of it is of use; opens one where that is better.
    bool place(int64_t at) {
        const int32_t head = a_.order[at];
        Shelf best, shelf;
        int64_t where = kNowhere, lanes_of_new = 0;
        int looked = 0;
        for (auto of = by_width_.lower_bound(a_.widths.least(head)); of != by_width_.end() && looked < 4; ++of) {
            if (of->second.empty()) continue;
            const int64_t island = of->second.top().second;
            if (!best_on(at, of->first, a_.islands[island].left, shelf)) continue;
            ++looked;
            if (where == kNowhere || shelf.useful > best.useful) best = shelf, where = island;
            if (best.useful > kWideEnough) break;
        }
        if (where == kNowhere || best.useful < kWideEnough) {
            const int64_t least = a_.widths.within(head, a_.limit - a_.problem.costs.item_ms());
            if (least > 0) {
                const int64_t asked = (least + a_.block - 1) / a_.block;
                const int64_t idle = (a_.problem.num_ranks - next_lane_) / a_.block;
                const int64_t blocks = std::max(asked, std::min(asked + a_.spare, idle));
                for (const int64_t lanes : {blocks * a_.block, (blocks + 1) * a_.block}) {
                    if (lanes > idle * a_.block) break;
                    if (!best_on(at, lanes, a_.limit, shelf)) continue;
                    if (where == kNowhere || shelf.useful > best.useful)
                        best = shelf, where = kNew, lanes_of_new = lanes;
                    if (best.useful > kWideEnough) break;
                }
            }
        }
        if (where == kNowhere) return false;
        if (where == kNew) {
            a_.islands.push_back({next_lane_, lanes_of_new, a_.limit, {}});
            next_lane_ += lanes_of_new;
            where = static_cast<int64_t>(a_.islands.size()) - 1;
        } else {
            by_width_[a_.islands[where].lanes].pop();
        }
        Island& island = a_.islands[where];
        island.left -= best.round.ms;
        for (const int32_t i : best.members)
            a_.placed[i] = 1;
        island.rounds.push_back(std::move(best.round));
        by_width_[island.lanes].push({island.left, where});
        return true;
    }

    Attempt& a_;
    int64_t next_lane_ = 0;
    // Of each width the islands, the one with most time left first.
    using Queue = std::priority_queue<std::pair<double, int64_t>>;
    std::map<int64_t, Queue> by_width_;
};

}  // namespace

bool place_long(Attempt& attempt) { return Shelves(attempt).place_all(); }

}  // namespace moetrain::planner
