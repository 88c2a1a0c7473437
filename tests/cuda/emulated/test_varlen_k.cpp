// Hopper's grouped GEMM with groups along K, under emulation, and the schedulers of all architectures.
#include <set>
#include <tuple>
#include <vector>

#include "launch_sm90.h"
#include "varlen_k_case.h"

namespace moetrain::test {
namespace {

using namespace moetrain::sm90;

void scheduler_deals_every_tile_once() {
    for (const int num_blocks : {1, 5, 100}) {
        std::multiset<std::tuple<int, int, int>> dealt;
        for (int block_idx = 0; block_idx < num_blocks; ++block_idx) {
            SlotTileScheduler scheduler(4, 3, 2, block_idx, num_blocks);
            for (SlotTile tile; scheduler.next(tile);)
                dealt.insert({tile.slot, tile.m_tile_idx, tile.n_tile_idx});
        }
        std::multiset<std::tuple<int, int, int>> expected;
        for (int slot = 0; slot < 4; ++slot)
            for (int m = 0; m < 3; ++m)
                for (int n = 0; n < 2; ++n)
                    expected.insert({slot, m, n});
        expect(dealt == expected, "tiles dealt to " + std::to_string(num_blocks) + " blocks are not those there are");
    }
}

void walk_takes_the_groups_of_a_slot_in_order() {
    const std::vector<int32_t> offsets = offsets_of({3, 0, 64, 65, 1});
    const SlotLists lists({1, 1, 0, 1, 2}, 4);
    const auto steps_of = [&](int slot) {
        SlotRowWalk<64> walk(offsets.data(), lists.offsets.data(), lists.groups.data(), slot);
        std::vector<std::pair<int, int>> steps;
        const int num_steps = walk.num_steps();
        for (RowStep step; walk.next(step);)
            steps.emplace_back(step.row_begin, step.row_end);
        expect(num_steps == static_cast<int>(steps.size()), "num_steps is not the number of steps");
        return steps;
    };
    using Steps = std::vector<std::pair<int, int>>;
    expect(steps_of(0) == Steps{{3, 67}}, "slot 0");
    expect(steps_of(1) == Steps{{0, 3}, {67, 132}, {131, 132}}, "slot 1");
    expect(steps_of(2) == Steps{{132, 133}}, "slot 2");
    expect(steps_of(3).empty(), "slot 3");
}

constexpr GemmShape kLarge{
    .tile_m = 128, .tile_n = 256, .num_stages = 2, .major_a = Major::kMn, .major_b = Major::kMn, .uses_cp_async = true};
constexpr GemmShape kSmall{.tile_m = 64,
                           .tile_n = 64,
                           .num_stages = 3,
                           .num_consumers = 1,
                           .major_a = Major::kMn,
                           .major_b = Major::kMn,
                           .uses_cp_async = true};

}  // namespace
}  // namespace moetrain::test

int main() {
    using namespace moetrain::sm90;
    using namespace moetrain::test;
    Runner runner;
    runner.run("scheduler deals every tile once", scheduler_deals_every_tile_once);
    runner.run("walk takes the groups of a slot in order", walk_takes_the_groups_of_a_slot_in_order);
    check_gemm<Hopper<kLarge>>(runner, "gathered B, 2 consumers",
                               {.group_sizes = {70, 0, 129, 1}, .a_width = 136, .b_width = 264, .gathers_b = true});
    check_gemm<Hopper<kSmall>>(runner, "gathered A, shared and empty slots",
                               {.group_sizes = {3, 64, 0, 130, 1, 65},
                                .a_width = 72,
                                .b_width = 104,
                                .gathers_a = true,
                                .slots = {4, 1, 0, 1, 4, 2},
                                .num_slots = 6});
    check_gemm<Hopper<kSmall>>(runner, "nothing gathered, more blocks than tiles",
                               {.group_sizes = {128, 60}, .a_width = 64, .b_width = 40, .num_blocks = 5});
    check_gemm<Hopper<kSmall>>(
        runner, "both gathered",
        {.group_sizes = {1, 66}, .a_width = 8, .b_width = 80, .gathers_a = true, .gathers_b = true});
    check_gemm<Hopper<kSmall>>(
        runner, "empty slots between long ones, one block",
        {.group_sizes = {0, 300, 0, 0, 290, 0, 65}, .a_width = 64, .b_width = 64, .gathers_b = true, .num_blocks = 1});
    check_gemm<Hopper<kSmall>, Output::kFloat>(
        runner, "stored as fp32", {.group_sizes = {0, 70, 1}, .a_width = 72, .b_width = 72, .gathers_b = true});
    check_gemm<Hopper<kSmall>, Output::kAdded>(
        runner, "added to fp32", {.group_sizes = {65, 0, 3}, .a_width = 40, .b_width = 136, .gathers_a = true});
    check_gemm<Hopper<kSmall>>(runner, "no rows", {.group_sizes = {0, 0}, .a_width = 16, .b_width = 24});
    return runner.exit_code();
}
