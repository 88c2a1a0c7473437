#include "planner/simple.h"

#include <algorithm>

namespace moetrain::planner {
namespace {

// Splitmix64 (Steele, Lea, Flood 2014).
class Draws {
 public:
    explicit Draws(uint64_t key) : state_(key) {}
    // In [0, below).
    int32_t next(int32_t below) {
        state_ += 0x9e3779b97f4a7c15u;
        uint64_t x = state_;
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
        return static_cast<int32_t>(((x ^ (x >> 31)) >> 32) * static_cast<uint64_t>(below) >> 32);
    }

 private:
    uint64_t state_;
};

constexpr int32_t kMostAffinity = 4;

}  // namespace

void plan_full(const Cluster& cluster, Seats& seats) {
    seats.affinity = {1, 0, 0};
    seats.offset_E1.clear();
    seats.holder_Z.clear();
    for (int32_t e = 0; e <= cluster.num_experts; ++e)
        seats.offset_E1.push_back(e * cluster.num_groups);
    for (int32_t e = 0; e < cluster.num_experts; ++e) {
        for (int32_t g = 0; g < cluster.num_groups; ++g)
            seats.holder_Z.push_back(g);
    }
    seats.weight_Z.assign(seats.holder_Z.size(), 1);
}

void plan_random(const Cluster& cluster, uint64_t key, Holders& holders, Seats& seats) {
    Draws draws(key);
    for (int32_t g = 0; g < cluster.num_groups; ++g) {
        const int32_t tries = draws.next(cluster.slots + 1);
        for (int32_t i = 0; i < tries; ++i) {
            const int32_t e = draws.next(cluster.num_experts);
            if (!holders.holds(e, g)) holders.add(e, g);
        }
    }
    holders.list(seats);
    seats.affinity = {draws.next(kMostAffinity), draws.next(kMostAffinity), draws.next(kMostAffinity)};
    int32_t& home = seats.affinity.home;  // not all may be 0
    home = std::max(home, seats.affinity.near + seats.affinity.far == 0 ? 1 : 0);
    const int32_t most = std::max(2, std::min(1 << 10, kMostShares / kMostAffinity / cluster.num_groups));
    seats.weight_Z.clear();
    for (int32_t e = 0; e < cluster.num_experts; ++e) {
        for (int32_t z = seats.offset_E1[e]; z < seats.offset_E1[e + 1]; ++z)
            seats.weight_Z.push_back(draws.next(2) * draws.next(most));
        int32_t& last = seats.weight_Z.back();  // so that some seat of each expert has a weight
        last = std::max(last, 1);
    }
}

}  // namespace moetrain::planner
