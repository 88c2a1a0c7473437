// Which replicas a layer gets: first those that level the load, then those that keep rows on their node.
#pragma once
#include <utility>
#include <vector>

#include "planner/holders.h"

namespace moetrain::planner {

class Fill {
 public:
    explicit Fill(const Cluster& cluster);

    // From owners alone. Water-fill: while a group exceeds the target, a replica of its heaviest expert takes over as
    // much as brings one of the two to it. Takers are the least loaded groups with fewer than `limit` replicas, on
    // nodes without the expert while such a node has one below the target.
    //
    // The hottest are served first. Where that leaves some above the target, small excesses may have taken slots that
    // are now missing; then these go first, and the last slot of each group is kept for the large excesses, which can
    // fill it up. The target is the mean, or more where the slots do not suffice.
    void level(const Layer& layer, const std::vector<double>& load_E, int32_t limit, Holders& holders);

    // Each node spends what its groups have left, up to `limit`, on the experts of which most seconds of rows are
    // saved: in proportion to its own load. Of its groups the one takes it whose experts the node asks for least.
    void save_rows(const Layer& layer, const Costs& costs, int32_t limit, Holders& holders);

 private:
    void begin(const Layer& layer, const std::vector<double>& load_E, double over_mean, Holders& holders);
    bool is_level() const;
    void move_excess(bool smallest_first, int32_t limit, Holders& holders);
    bool move_some(int32_t hot, int32_t limit, Holders& holders);
    int32_t heaviest_expert(const std::vector<int32_t>& held) const;
    void find_lightest(int32_t node, int32_t limit, const Holders& holders);
    int32_t taker_of(int32_t expert, int32_t limit, const Holders& holders) const;
    void spend(const Layer& layer, int32_t node, double first_s, double home_s, int32_t limit, Holders& holders);
    int32_t weigh_groups(const Layer& layer, int32_t node, int32_t limit, const Holders& holders);
    double keep_best(double gain_s, int32_t expert, size_t most);
    int32_t least_asked(int32_t expert, int32_t node, int32_t limit, const Holders& holders) const;

    Cluster cluster_;
    double target_ = 0;
    std::vector<double> left_E_;  // what an owner still computes of its expert
    std::vector<double> load_G_;
    std::vector<double> asked_G_;                   // pairs of the node for all that a group of it holds
    std::vector<int32_t> lightest_N_;               // with a free slot
    std::vector<double> least_N_;                   // its load; of a node without one beyond all loads
    std::vector<std::pair<double, int32_t>> hot_;   // heap of (load or -load, -group)
    std::vector<std::pair<double, int32_t>> gain_;  // (seconds saved, expert), most first
};

}  // namespace moetrain::planner
