// Token rounding as in offer_pairs.cu and round_pairs.cu, which must have the bits of the CPU's.
//
// Kernel: rounding/offer_pairs.cu
// Kernel: rounding/round_pairs.cu
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "cpu/rounding/offer_pairs.cpp"
#include "cpu/rounding/round_pairs.cpp"
#include "cuda/rounding/offer_pairs.h"
#include "cuda/rounding/round_pairs.h"
#include "cuda_runtime.h"
#include "expect.h"

namespace moetrain::test {
namespace {

using Random = std::mt19937_64;

constexpr int32_t kGuard = -77;
constexpr auto kRules = {RoundRule::kNearest, RoundRule::kStochastic, RoundRule::kNearestScore,
                         RoundRule::kBalance, RoundRule::kUp,         RoundRule::kDown};

template <class T>
void expect_same(const std::vector<T>& actual, const std::vector<T>& expected, const std::string& what) {
    for (size_t i = 0; i < expected.size(); ++i)
        expect(actual[i] == expected[i], what + "[" + std::to_string(i) + "]: expected " + std::to_string(expected[i]) +
                                             ", got " + std::to_string(actual[i]));
}

struct Sizes {
    int64_t num_tokens;  // of one rank
    int64_t num_experts;
    int64_t tile;
    int64_t chosen_of_100 = 10;  // pairs of 100 tokens and experts
    int64_t world = 1;
};

enum class Scores { kAny, kFew, kOne, kAscending, kOdd };

// What one rank knows.
template <class Acc>
struct Part {
    Sizes sizes;
    std::vector<int32_t> token;
    std::vector<int32_t> offset{0};
    std::vector<Acc> score;
    std::vector<int64_t> gid;
    std::vector<uint8_t> valid;  // empty: all are

    int64_t stride() const { return sizes.num_experts + 3; }
    PairList pairs() const {
        return {token.data(), offset.data(), sizes.num_tokens, sizes.num_experts, static_cast<int64_t>(token.size())};
    }
    OfferInput<Acc> input() const {
        return {.pairs = pairs(),
                .score_TE = score.data(),
                .stride = stride(),
                .token_gid_T2 = gid.data(),
                .valid_T = valid.empty() ? nullptr : reinterpret_cast<const bool*>(valid.data()),
                .tile = sizes.tile};
    }
};

template <class Acc>
Acc draw_score(Random& random, Scores scores, int64_t t) {
    constexpr Acc kInfinity = std::numeric_limits<Acc>::infinity();
    const auto whole = static_cast<Acc>(random() % 3);
    switch (scores) {
        case Scores::kFew:
            return whole - 1;
        case Scores::kOne:
            return Acc(0.25);
        case Scores::kAscending:
            return static_cast<Acc>(t) + whole;
        case Scores::kOdd:
            switch (random() % 12) {
                case 0:
                    return kInfinity;
                case 1:
                    return -kInfinity;
                case 2:
                    return std::numeric_limits<Acc>::quiet_NaN();
                case 3:
                    return -std::numeric_limits<Acc>::quiet_NaN();
                case 4:
                    return Acc(-0.0);
                case 5:
                    return Acc(0.0);
                case 6:
                    return std::numeric_limits<Acc>::denorm_min() * static_cast<Acc>(random() % 5);
                default:
                    return std::ldexp(static_cast<Acc>(random() % 1000) - 500, static_cast<int>(random() % 60) - 30);
            }
        default:
            return std::exp(std::normal_distribution<Acc>()(random));
    }
}

template <class Acc>
Part<Acc> draw_part(Random& random, const Sizes& sizes, Scores scores, bool some_valid, bool shuffled, int64_t rank) {
    Part<Acc> part{.sizes = sizes};
    const int64_t num_tokens = sizes.num_tokens;
    if (scores == Scores::kFew) rank = 0;  // ids of several ranks are the same: of equals, the lower rank's goes first
    for (int64_t t = 0; t < num_tokens; ++t) {
        part.gid.insert(part.gid.end(), {rank * num_tokens + t / 5, t % 5});
        if (some_valid) part.valid.push_back(random() % 5 != 0);
        for (int64_t e = 0; e < part.stride(); ++e)
            part.score.push_back(e < sizes.num_experts ? draw_score<Acc>(random, scores, t) : Acc(1e30));
    }
    for (int64_t t = num_tokens - 1; t > 0 && shuffled; --t)
        for (const int64_t other = random() % (t + 1); const int64_t k : {0, 1})
            std::swap(part.gid[2 * t + k], part.gid[2 * other + k]);
    for (int64_t e = 0; e < sizes.num_experts; ++e) {
        // Every fourth expert nobody chose, every seventh by all.
        const int64_t share = e % 4 == 3 ? 0 : e % 7 == 6 ? 100 : sizes.chosen_of_100;
        for (int32_t t = 0; t < num_tokens; ++t)
            if (static_cast<int64_t>(random() % 100) < share) part.token.push_back(t);
        part.offset.push_back(static_cast<int32_t>(part.token.size()));
    }
    part.token.insert(part.token.end(), 9, kGuard);  // the list's capacity is more than its length
    return part;
}

struct OfferLists {
    std::vector<int64_t> offers;
    std::vector<int32_t> token;
};

template <class Acc>
OfferLists offer(const Part<Acc>& part) {
    const Sizes& s = part.sizes;
    const auto num_offers = static_cast<size_t>(s.num_experts * OfferRow::size(s.tile));
    const auto num_offered = static_cast<size_t>(s.num_experts * 2 * s.tile);
    OfferLists expected{std::vector<int64_t>(num_offers, 0), std::vector<int32_t>(num_offered, 0)};
    offer_pairs_kernel(part.input(), expected.offers.data(), expected.token.data());

    OfferLists actual{std::vector<int64_t>(num_offers, kGuard), std::vector<int32_t>(num_offered, kGuard)};
    const int64_t bytes = offer_pairs_scratch_bytes(s.num_tokens, s.num_experts, s.tile, sizeof(Acc));
    std::vector<int64_t> scratch(static_cast<size_t>(bytes / 8), kGuard);
    const auto status =
        launch_offer_pairs(part.input(), actual.offers.data(), actual.token.data(), scratch.data(), nullptr);
    expect(status == cudaSuccess, "launch_offer_pairs failed");
    expect_same(actual.offers, expected.offers, "offers");
    expect_same(actual.token, expected.token, "offered token");
    return actual;
}

struct RoundedLists {
    explicit RoundedLists(size_t num_experts, size_t capacity)
        : token(capacity, kGuard),
          source(capacity, kGuard),
          offset(num_experts + 1, kGuard),
          added(num_experts, kGuard),
          dropped(num_experts, kGuard) {}
    RoundOutput output() {
        return {token.data(), source.data(),  offset.data(),
                added.data(), dropped.data(), static_cast<int64_t>(token.size())};
    }
    std::vector<int32_t> token, source, offset;
    std::vector<int64_t> added, dropped;
};

void round_once(const RoundInput& in, const std::string& what) {
    const auto num_experts = static_cast<size_t>(in.pairs.num_experts);
    const int64_t most = std::min(most_added(in.rule, in.tile), in.pairs.num_tokens);
    const auto capacity = static_cast<size_t>(in.pairs.capacity + in.pairs.num_experts * most);
    RoundedLists expected(num_experts, capacity), actual(num_experts, capacity);
    round_pairs_kernel(in, expected.output());
    std::vector<int64_t> scratch(static_cast<size_t>(round_pairs_scratch_size(in.pairs.num_experts, in.world)), kGuard);
    expect(launch_round_pairs(in, actual.output(), scratch.data(), nullptr) == cudaSuccess,
           "launch_round_pairs failed");
    expect_same(actual.added, expected.added, what + "added");
    expect_same(actual.dropped, expected.dropped, what + "dropped");
    expect_same(actual.offset, expected.offset, what + "offset");
    expect_same(actual.token, expected.token, what + "token");
    expect_same(actual.source, expected.source, what + "source");
}

// All rules, by the first rank, the last and one between; without `holder`, all send to one.
template <class Acc>
void round_all(const std::vector<Part<Acc>>& parts, const std::vector<OfferLists>& made,
               const std::vector<int32_t>& holder, uint64_t key) {
    std::vector<int64_t> offers;
    for (const OfferLists& each : made)
        offers.insert(offers.end(), each.offers.begin(), each.offers.end());
    int rule_idx = 0;
    for (const RoundRule rule : kRules) {
        for (const size_t rank : std::set<size_t>{0, parts.size() / 2, parts.size() - 1}) {
            const RoundInput in{.pairs = parts[rank].pairs(),
                                .offers_WEX = offers.data(),
                                .offer_token_E2M = made[rank].token.data(),
                                .holder_WE = holder.empty() ? nullptr : holder.data(),
                                .world = static_cast<int64_t>(parts.size()),
                                .rank = static_cast<int64_t>(rank),
                                .tile = parts[rank].sizes.tile,
                                .rule = rule,
                                .key = key,
                                .is_double = sizeof(Acc) == 8};
            round_once(in, "rule " + std::to_string(rule_idx) + ", rank " + std::to_string(rank) + ", ");
        }
        ++rule_idx;
    }
}

template <class Acc>
void check(Random& random, const Sizes& sizes, Scores scores, bool some_valid, bool shuffled) {
    std::vector<Part<Acc>> parts;
    std::vector<OfferLists> made;
    for (int64_t rank = 0; rank < sizes.world; ++rank) {
        parts.push_back(draw_part<Acc>(random, sizes, scores, some_valid, shuffled, rank));
        made.push_back(offer(parts.back()));
    }
    round_all(parts, made, {}, random());
    if (sizes.world == 1) return;
    std::vector<int32_t> holder(static_cast<size_t>(sizes.world * sizes.num_experts));
    for (int32_t& each : holder)
        each = static_cast<int32_t>(random() % 3) * 5;
    round_all(parts, made, holder, random());
}

template <class Acc>
void any_sizes(Random& random) {
    check<Acc>(random, {.num_tokens = 0, .num_experts = 5, .tile = 4}, Scores::kAny, false, false);
    check<Acc>(random, {.num_tokens = 1, .num_experts = 1, .tile = 1, .chosen_of_100 = 100}, Scores::kAny, true, true);
    check<Acc>(random, {.num_tokens = 20, .num_experts = 9, .tile = 32, .chosen_of_100 = 60}, Scores::kAny, true, true);
    check<Acc>(random, {.num_tokens = 600, .num_experts = 37, .tile = 16}, Scores::kAny, true, true);
    check<Acc>(random, {.num_tokens = 1100, .num_experts = 3, .tile = 100, .chosen_of_100 = 40}, Scores::kAny, false,
               false);
    check<Acc>(random, {.num_tokens = 300, .num_experts = 4, .tile = 200, .chosen_of_100 = 50}, Scores::kAny, true,
               false);
}

template <class Acc>
void any_scores(Random& random) {
    for (const Scores scores : {Scores::kFew, Scores::kOne, Scores::kAscending, Scores::kOdd})
        for (const bool shuffled : {false, true})
            check<Acc>(random, {.num_tokens = 530, .num_experts = 8, .tile = 12, .chosen_of_100 = 30}, scores, shuffled,
                       shuffled);
}

template <class Acc>
void ranks(Random& random) {
    check<Acc>(random, {.num_tokens = 40, .num_experts = 13, .tile = 8, .chosen_of_100 = 30, .world = 3}, Scores::kAny,
               true, true);
    check<Acc>(random, {.num_tokens = 30, .num_experts = 9, .tile = 16, .chosen_of_100 = 30, .world = 5}, Scores::kFew,
               false, true);
    check<Acc>(random, {.num_tokens = 5, .num_experts = 4, .tile = 4, .chosen_of_100 = 30, .world = 35}, Scores::kAny,
               false, false);
}

// Experts with more pairs than one block writes.
void long_lists(Random& random) {
    check<float>(random, {.num_tokens = 20000, .num_experts = 1, .tile = 3, .chosen_of_100 = 70}, Scores::kAny, false,
                 false);
}

}  // namespace
}  // namespace moetrain::test

int main() {
    using namespace moetrain::test;
    Runner runner;
    const auto with_seeds = [&runner](const std::string& name, void (*check)(Random&), int num_seeds) {
        for (int seed = 1; seed <= num_seeds; ++seed)
            runner.run(name + ", seed " + std::to_string(seed), [&] {
                moetrain::emulation::launch_settings.seed = 100 * static_cast<uint64_t>(seed);
                Random random(static_cast<uint64_t>(seed));
                check(random);
            });
    };
    with_seeds("sizes, float32", any_sizes<float>, 1);
    with_seeds("sizes, float64", any_sizes<double>, 1);
    with_seeds("scores, float32", any_scores<float>, 1);
    with_seeds("scores, float64", any_scores<double>, 1);
    with_seeds("ranks, float32", ranks<float>, 1);
    with_seeds("ranks, float64", ranks<double>, 1);
    with_seeds("long lists", long_lists, 1);
    return runner.exit_code();
}
