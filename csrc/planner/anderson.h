// Anderson's acceleration of a fixed-point iteration (1965): the next point is the one that the last few steps, taken
// to be linear, would have brought nearest to rest.
#pragma once
#include <array>
#include <cstddef>
#include <vector>

namespace moetrain::planner {

class Anderson {
 public:
    explicit Anderson(size_t size);

    // Forgets all steps.
    void restart();
    // Given x and what a plain step would add to it, moves x.
    void step(std::vector<float>& x, const std::vector<float>& rise);

 private:
    static constexpr int kDepth = 4;
    using Vector = std::array<double, kDepth>;

    void remember(const std::vector<float>& x, const std::vector<float>& rise);
    Vector mix(const std::vector<float>& rise) const;

    int taken_ = 0;
    std::vector<float> last_x_, last_rise_;
    std::array<std::vector<float>, kDepth> moved_, changed_;  // differences of x and of rise, the oldest overwritten
    std::array<Vector, kDepth> gram_{};                       // of changed_
};

}  // namespace moetrain::planner
