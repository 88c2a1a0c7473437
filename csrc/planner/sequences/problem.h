// A step's sequences, and the ranks that there are for them.
#pragma once
#include <cstdint>
#include <vector>

#include "planner/sequences/costs.h"
#include "planner/sequences/plan.h"

namespace moetrain::planner {

struct SequenceProblem {
    const int64_t* num_tokens;
    int64_t num_sequences;
    int64_t num_ranks, block, capacity, gang;
    bool equal_rounds;
    SequenceCosts costs;
};

// A plan as it is made: items in any order.
class SequenceItems {
 public:
    struct Item {
        int32_t round;
        int64_t members, ranks;  // where they begin, as one list each
        int32_t num_members, num_ranks;
        double ms;
    };

    // Members and ranks that are added from here on are of this item.
    void begin(int32_t round) {
        items_.push_back({round, static_cast<int64_t>(members_.size()), static_cast<int64_t>(ranks_.size()), 0, 0, 0});
    }
    void add_member(int32_t sequence) { members_.push_back(sequence), ++items_.back().num_members; }
    void add_rank(int32_t rank) { ranks_.push_back(rank), ++items_.back().num_ranks; }

    std::vector<Item>& items() { return items_; }
    const std::vector<Item>& items() const { return items_; }
    const int32_t* members(const Item& item) const { return members_.data() + item.members; }
    const int32_t* ranks(const Item& item) const { return ranks_.data() + item.ranks; }
    int64_t num_members() const { return static_cast<int64_t>(members_.size()); }
    int64_t num_item_ranks() const { return static_cast<int64_t>(ranks_.size()); }

 private:
    std::vector<Item> items_;
    std::vector<int32_t> members_, ranks_;
};

struct SequencePlanMade {
    SequenceItems items;
    std::vector<int32_t> rounds;  // of each rank
    double lower_bound_ms = 0, makespan_ms = 0;
};

// Whether each rank of a gang of `num_ranks` has at most `capacity` of a sequence's tokens.
inline bool share_fits(int64_t num_tokens, int64_t num_ranks, int64_t capacity) {
    const int64_t part = num_tokens / (2 * num_ranks);
    if (num_tokens % (2 * num_ranks) == 0 || 2 * part + 2 <= capacity) return 2 * part <= capacity;
    if (2 * part + 1 > capacity) return num_ranks == 1 && num_tokens <= capacity;
    for (int64_t place = 0; place < num_ranks; ++place) {
        if (share_of(num_tokens, num_ranks, place) > capacity) return false;
    }
    return true;
}

// The fewest ranks that hold a sequence, or 0 where all of them do not.
inline int64_t least_ranks(int64_t num_tokens, int64_t num_ranks, int64_t capacity) {
    int64_t d = std::max<int64_t>(1, (num_tokens + capacity - 1) / capacity);
    while (d <= num_ranks && !share_fits(num_tokens, d, capacity))
        ++d;  // a few more, where the capacity is odd
    return d <= num_ranks ? d : 0;
}

}  // namespace moetrain::planner
