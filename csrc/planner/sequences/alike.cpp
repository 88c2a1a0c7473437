// One island of all ranks: rounds of sequences that are alike.
//
// All ranks wait for the longest gang of each round, and what a rank can hold forbids a short sequence to take as long
// as a long one. So a round has neighbours in the order of length, each with as many ranks as make it as long as the
// round. Where one round ends and the next begins is chosen by dynamic programming over places of that order.
#include <algorithm>
#include <cmath>
#include <limits>

#include "planner/sequences/islands.h"

namespace moetrain::planner {
namespace {

constexpr double kPlaces = 1.15;  // from one place where a round may end to the next
constexpr double kFewer = .05;    // added to that each time that many ranks double
constexpr int kBisections = 14;   // of a round's length
constexpr double kNever = std::numeric_limits<double>::infinity();

class Alike {
 public:
    Alike(Attempt& attempt, int64_t part) : a_(attempt), item_ms_(attempt.problem.costs.item_ms()) {
        while (num_long_ < a_.problem.num_sequences) {
            const int32_t i = a_.order[num_long_];
            if (a_.widths.least(i) == 1 && part * a_.problem.num_tokens[i] < a_.problem.capacity) break;
            ++num_long_;
        }
        const double doubled = std::log2(static_cast<double>(a_.problem.num_ranks) / static_cast<double>(kManyRanks));
        const double ratio = kPlaces + kFewer * std::max(0.0, doubled);
        for (double place = 0; place < static_cast<double>(num_long_); place = std::max(place + 1, place * ratio))
            places_.push_back(static_cast<int64_t>(place));
        places_.push_back(num_long_);
    }

    // Rounds for all gangs; short sequences are left for others to deal out.
    bool place_all() {
        Island island{0, a_.problem.num_ranks, a_.limit, {}};
        for (const Span& span : spans()) {
            if (span.ms == kNever) return false;
            Round round;
            for (int64_t at = span.first; at < span.last; ++at) {
                const int32_t i = a_.order[at];
                const int64_t d = a_.widths.within(i, span.ms - item_ms_);
                if (d == 1) continue;
                round.gangs.push_back({i, round.used, d});
                round.used += d;
                a_.placed[i] = 1;
            }
            round.ms = span.ms;
            island.left -= span.ms;
            island.rounds.push_back(std::move(round));
        }
        a_.islands.push_back(std::move(island));
        a_.first_short = 0;
        return true;
    }

 private:
    struct Span {
        int64_t first, last;  // in the order of length
        double ms;
    };

    // Where rounds begin and end for the least sum of their lengths.
    std::vector<Span> spans() {
        const size_t count = places_.size();
        std::vector<double> least(count, kNever), length(count, kNever);
        std::vector<size_t> from(count, 0);
        least[0] = 0;
        for (size_t begin = 0; begin + 1 < count; ++begin) {
            if (least[begin] == kNever) continue;
            double shortest = 0;  // a round is no shorter with one sequence more
            for (size_t end = begin + 1; end < count; ++end) {
                shortest = shortest_round(places_[begin], places_[end], shortest);
                if (shortest == kNever) break;
                if (least[begin] + shortest < least[end])
                    least[end] = least[begin] + shortest, from[end] = begin, length[end] = shortest;
            }
        }
        std::vector<Span> found;
        for (size_t end = count - 1; end > 0; end = from[end]) {
            found.push_back({places_[from[end]], places_[end], length[end]});
            if (length[end] == kNever) break;
        }
        std::reverse(found.begin(), found.end());
        return found;
    }

    // The least length in which these sequences fit side by side; `least` is a length below which they do not.
    double shortest_round(int64_t first, int64_t last, double least) {
        double slowest = 0;
        for (int64_t at = first; at < last; ++at)
            slowest = std::max(slowest, a_.widths.ms_of_least(a_.order[at]));
        double high = slowest + item_ms_, low = least;
        if (!fits(first, last, high)) return kNever;
        if (least > 0 && fits(first, last, least)) return least;
        for (int step = 0; step < kBisections; ++step) {
            const double middle = (low + high) / 2;
            (fits(first, last, middle) ? high : low) = middle;
        }
        return high;
    }

    bool fits(int64_t first, int64_t last, double ms) {
        const double time = ms - item_ms_;
        if (time <= 0) return false;
        int64_t lanes = 0;
        double alone_ms = 0, alone_tokens = 0;
        for (int64_t at = first; at < last; ++at) {
            const int32_t i = a_.order[at];
            const int64_t d = a_.widths.within(i, time);
            if (d == 0) return false;
            if (d > 1) {
                lanes += d;
            } else {
                alone_ms += a_.widths.ms_of_least(i);
                alone_tokens += static_cast<double>(a_.problem.num_tokens[i]);
            }
            if (lanes > a_.problem.num_ranks) return false;
        }
        const double packs = std::max(alone_ms / time, alone_tokens / static_cast<double>(a_.problem.capacity));
        return lanes + static_cast<int64_t>(std::ceil(packs)) <= a_.problem.num_ranks;
    }

    Attempt& a_;
    double item_ms_;
    int64_t num_long_ = 0;
    std::vector<int64_t> places_;
};

}  // namespace

bool place_alike(Attempt& attempt, int64_t part) { return Alike(attempt, part).place_all(); }

}  // namespace moetrain::planner
