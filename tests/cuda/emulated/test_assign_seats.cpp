// Seats as in assign_seats.cu, which must be the CPU's.
//
// Kernel: routing/assign_seats.cu
#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "cpu/routing/assign_seats.cpp"
#include "cuda/routing/assign_seats.h"
#include "cuda_runtime.h"
#include "expect.h"
#include "vectors.h"

namespace moetrain::test {
namespace {

constexpr size_t kTail = 9;  // places of the list behind the last pair

struct Sizes {
    int64_t num_tokens;
    int64_t num_experts;
    int64_t num_groups;
    int64_t chosen_of_100 = 30;  // pairs of 100 tokens and experts
    int64_t held_of_100 = 50;    // seats of 100 experts and groups
    int64_t domain_size = 2;
    int64_t most_share = 9;
};

struct Lists {
    std::vector<int32_t> token, offset{0}, seat_offset{0}, holder, share;
};

// Every fifth expert nobody chose, every seventh by all; an expert has one seat at least, the first of some share.
Lists draw_lists(Random& random, const Sizes& sizes) {
    Lists lists;
    const auto yes = [&random](int64_t of_100) { return static_cast<int64_t>(random() % 100) < of_100; };
    for (int64_t e = 0; e < sizes.num_experts; ++e) {
        const int64_t chosen = e % 5 == 3 ? 0 : e % 7 == 6 ? 100 : sizes.chosen_of_100;
        for (int32_t t = 0; t < sizes.num_tokens; ++t)
            if (yes(chosen)) lists.token.push_back(t);
        lists.offset.push_back(static_cast<int32_t>(lists.token.size()));
        const auto certain = static_cast<int32_t>(random() % sizes.num_groups);
        for (int32_t group = 0; group < sizes.num_groups; ++group) {
            if (group != certain && !yes(sizes.held_of_100)) continue;
            lists.holder.push_back(group);
            lists.share.push_back(static_cast<int32_t>(random() % (sizes.most_share + 1)) + (group == certain));
        }
        lists.seat_offset.push_back(static_cast<int32_t>(lists.holder.size()));
    }
    lists.token.insert(lists.token.end(), kTail, kGuard);
    return lists;
}

SeatProblem problem_of(const Lists& lists, const Sizes& sizes, int64_t source) {
    const int64_t near_begin = source - source % sizes.domain_size;
    return {.token = lists.token.data(),
            .offset = lists.offset.data(),
            .seat_offset = lists.seat_offset.data(),
            .holder = lists.holder.data(),
            .share = lists.share.data(),
            .num_experts = sizes.num_experts,
            .num_tokens = sizes.num_tokens,
            .num_groups = sizes.num_groups,
            .source = source,
            .near_begin = near_begin,
            .near_end = std::min(near_begin + sizes.domain_size, sizes.num_groups)};
}

void check(Random& random, const Sizes& sizes) {
    const Lists lists = draw_lists(random, sizes);
    const SeatProblem in = problem_of(lists, sizes, static_cast<int64_t>(random() % sizes.num_groups));
    const auto num_pairs = static_cast<int64_t>(lists.token.size());
    const auto num_seats = static_cast<int64_t>(lists.holder.size());
    const SeatFault fault = first_seat_fault(in, num_pairs, num_seats);
    expect(fault.must == nullptr, std::string("a case that breaks a promise: ") + (fault.must ? fault.must : ""));
    std::vector<int32_t> expected(lists.token.size(), -1), actual(lists.token.size() + kTail, kGuard);
    assign_seats_kernel(in, expected.data());
    std::vector<int32_t> scratch(static_cast<size_t>(assign_seats_scratch_size(in, num_seats)) + kTail, kGuard);
    const auto status = launch_assign_seats(in, num_pairs, num_seats, actual.data(), scratch.data(), nullptr);
    expect(status == cudaSuccess, "launch_assign_seats failed");
    const std::vector<int32_t> guards(kTail, kGuard);
    expected.insert(expected.end(), kTail, kGuard);
    expect_equal(actual, expected, "seat");
    expect_equal({scratch.end() - kTail, scratch.end()}, guards, "behind scratch");
}

void any_sizes(Random& random) {
    check(random, {.num_tokens = 0, .num_experts = 5, .num_groups = 3});
    check(random, {.num_tokens = 9, .num_experts = 0, .num_groups = 3});
    check(random, {.num_tokens = 1, .num_experts = 4, .num_groups = 1, .chosen_of_100 = 100});
    check(random, {.num_tokens = 256, .num_experts = 9, .num_groups = 6});
    check(random, {.num_tokens = 257, .num_experts = 8, .num_groups = 6, .domain_size = 4});
    check(random, {.num_tokens = 300, .num_experts = 37, .num_groups = 9, .domain_size = 9});
    check(random, {.num_tokens = 200, .num_experts = 70, .num_groups = 16, .held_of_100 = 15, .domain_size = 8});
}

// More blocks of tokens than blocks of threads.
void many_tokens(Random& random) {
    check(random, {.num_tokens = 1100, .num_experts = 5, .num_groups = 4, .most_share = 100'000});
}

// A token has more entries than a warp has lanes, an expert more seats.
void many_seats(Random& random) {
    check(random, {.num_tokens = 150, .num_experts = 6, .num_groups = 70, .chosen_of_100 = 60, .held_of_100 = 90});
    check(random, {.num_tokens = 30, .num_experts = 40, .num_groups = 20, .chosen_of_100 = 90, .held_of_100 = 80});
}

// What a block of tokens needs does not fit in shared memory.
void many_groups(Random& random) {
    check(random, {.num_tokens = 1100, .num_experts = 4, .num_groups = 13'000, .held_of_100 = 1, .domain_size = 5000});
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
    with_seeds("sizes", any_sizes, 3);
    with_seeds("many tokens", many_tokens, 1);
    with_seeds("many seats", many_seats, 1);
    with_seeds("many groups", many_groups, 1);
    return runner.exit_code();
}
