// Ampere's grouped GEMM with groups along K, under emulation.
#include "launch_sm80.h"
#include "varlen_k_case.h"

namespace moetrain::test {
namespace {

using namespace moetrain::sm80;

constexpr GemmShape kTwoBlocks{.tile_m = 128,
                               .tile_n = 128,
                               .num_stages = 3,
                               .blocks_per_multiprocessor = 2,
                               .major_a = Major::kMn,
                               .major_b = Major::kMn};
constexpr GemmShape kSmall{.tile_m = 64,
                           .tile_n = 64,
                           .num_stages = 4,
                           .warp_m = 32,
                           .warp_n = 32,
                           .major_a = Major::kMn,
                           .major_b = Major::kMn};

void arguments_are_checked() {
    VarlenKProblem problem{.a = {.data = nullptr, .num_rows = 1, .width = 8},
                           .b = {.data = nullptr, .num_rows = 1, .width = 12}};
    const auto expect_refused = [&](const std::string& text) {
        expect_throws<std::invalid_argument>(
            text, [&] { make_varlen_k_arguments<GemmConfig<kSmall>>(problem, StoreEpilogue{}); });
    };
    expect_refused("b must be a positive multiple of 8 (16-byte rows), got 12");
    const int32_t offset = 0;
    problem.slot_offsets = &offset;
    expect_refused("slot_offsets and slot_groups must be given together");
}

}  // namespace
}  // namespace moetrain::test

int main() {
    using namespace moetrain::test;
    Runner runner;
    runner.run("arguments are checked", arguments_are_checked);
    check_gemm<Ampere<kTwoBlocks>>(
        runner, "gathered B",
        {.group_sizes = {70, 0, 33, 1}, .a_width = 136, .b_width = 200, .gathers_b = true, .num_blocks = 3});
    check_gemm<Ampere<kSmall>>(runner, "gathered A, shared and empty slots",
                               {.group_sizes = {3, 64, 0, 130, 1, 65},
                                .a_width = 72,
                                .b_width = 104,
                                .gathers_a = true,
                                .slots = {4, 1, 0, 1, 4, 2},
                                .num_slots = 6});
    check_gemm<Ampere<kTwoBlocks>>(runner, "nothing gathered, more blocks than tiles",
                                   {.group_sizes = {128, 60}, .a_width = 64, .b_width = 40, .num_blocks = 5});
    check_gemm<Ampere<kSmall>>(
        runner, "both gathered",
        {.group_sizes = {1, 66}, .a_width = 8, .b_width = 80, .gathers_a = true, .gathers_b = true});
    check_gemm<Ampere<kSmall>>(
        runner, "empty slots between long ones, one block",
        {.group_sizes = {0, 150, 0, 0, 70, 0, 65}, .a_width = 64, .b_width = 64, .gathers_b = true, .num_blocks = 1});
    check_gemm<Ampere<kSmall>, Output::kFloat>(
        runner, "stored as fp32", {.group_sizes = {0, 70, 1}, .a_width = 72, .b_width = 72, .gathers_b = true});
    check_gemm<Ampere<kSmall>, Output::kAdded>(
        runner, "added to fp32", {.group_sizes = {65, 0, 3}, .a_width = 40, .b_width = 136, .gathers_a = true});
    check_gemm<Ampere<kSmall>>(runner, "no rows", {.group_sizes = {0, 0}, .a_width = 16, .b_width = 24});
    return runner.exit_code();
}
