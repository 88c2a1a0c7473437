// Our planner of one layer: replicas that level the load and keep rows near, and prices that split the tokens.
#pragma once
#include <array>
#include <vector>

#include "planner/fill.h"
#include "planner/measure.h"
#include "planner/prices.h"

namespace moetrain::planner {

class LevelRows {
 public:
    explicit LevelRows(const Cluster& cluster);

    // Seats and weights of least modelled seconds among: as many replicas per group as other work hides, or more of the
    // slots; a stronger or weaker preference for a token's own node. Loads are levelled in all of them.
    Measure plan(const Layer& layer, const std::vector<double>& load_E, const Costs& costs, Holders& holders,
                 Seats& seats);

    // Weights and affinity anew for the holders that seats has.
    Measure split_anew(const Layer& layer, const std::vector<double>& load_E, const Costs& costs, Seats& seats);

 private:
    struct Plan {
        Seats seats;
        Measure measure;
        double seconds;
    };
    void plan_within(int32_t limit, const Layer& layer, const std::vector<double>& load_E, const Costs& costs,
                     Holders& holders);
    void weigh(const Affinity& affinity, const Costs& costs);
    float solve(const Affinity& affinity, float tolerance);
    std::array<double, PriceSolver::kTogether> row_seconds(size_t first, const Costs& costs);
    size_t choose_level(const Costs& costs);
    void split(double highest, const Costs& costs);

    Cluster cluster_;
    Fill fill_;
    PriceSolver prices_;
    Meter meter_;
    Plan tried_, best_;
};

}  // namespace moetrain::planner
