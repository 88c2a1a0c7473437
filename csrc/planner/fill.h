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
    // fill it up. The target is the mean, or more where the slots do not suffice. Returns the
    // highest load over the mean: a split exists that is as level.
    double level(const Layer& layer, const std::vector<double>& load_E, int32_t limit, Holders& holders);

    // Each node spends what its groups have left, up to `limit`, on the experts of which most seconds of rows are
    // saved: in proportion to its own load. Of its groups the one takes it whose experts the node asks for least.
    void save_rows(const Layer& layer, const std::vector<double>& load_E, const Costs& costs, int32_t limit,
                   Holders& holders);

 private:
    void begin(const Layer& layer, const std::vector<double>& load_E, double over_mean, Holders& holders);
    double highest_load() const;
    void move_excess(bool smallest_first, int32_t limit, Holders& holders);
    bool move_some(int32_t hot, int32_t limit, Holders& holders);
    int32_t heaviest_expert(const std::vector<int32_t>& held) const;
    struct Lightest {  // group of a node with a free slot; of a node without one -1, with a load beyond all loads
        double load;
        int32_t node, group;
        bool operator<(const Lightest& other) const {
            return load < other.load || (load == other.load && node < other.node);
        }
    };
    Lightest find_lightest(int32_t node, int32_t limit, const Holders& holders) const;
    void order_nodes(int32_t limit, const Holders& holders);
    void order_anew(int32_t node, int32_t limit, const Holders& holders);
    int32_t taker_of(int32_t expert, int32_t limit, const Holders& holders) const;
    void spend(const Layer& layer, int32_t node, double first_s, double home_s, int32_t limit, Holders& holders);
    int32_t weigh_groups(const Layer& layer, int32_t node, int32_t limit, const Holders& holders);
    void find_hottest(const std::vector<double>& load_E, size_t most);
    float bound_of_gains(const uint8_t* is_here_E, size_t most) const;
    void find_candidates(float bound);
    size_t best_candidate() const;
    int32_t least_asked(int32_t expert, int32_t node, int32_t limit, const Holders& holders) const;

    Cluster cluster_;
    double target_ = 0;
    std::vector<double> left_E_;  // what an owner still computes of its expert
    std::vector<double> load_G_;
    std::vector<double> asked_G_;                  // pairs of the node for all that a group of it holds
    std::vector<Lightest> lightest_N_;             // ascending
    std::vector<int32_t> place_N_;                 // of a node in these
    std::vector<std::pair<double, int32_t>> hot_;  // heap of (load or -load, -group)
    std::vector<uint64_t> by_load_;                // load and expert of each in one number
    std::vector<int32_t> hottest_;                 // experts by load, a few more than a node has slots
    std::vector<float> gain_E_;                    // seconds that a node saves by a replica
    std::vector<int32_t> candidate_;               // experts whose gain may be among the best, ascending
    std::vector<float> gain_;                      // theirs
    size_t num_candidates_ = 0;
};

}  // namespace moetrain::planner
