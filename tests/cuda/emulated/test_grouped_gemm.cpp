// Hopper's grouped GEMM with groups along M, under emulation.
#include <vector>

#include "grouped_gemm_case.h"
#include "launch_sm90.h"

namespace moetrain::test {
namespace {

using namespace moetrain::sm90;

void arguments_are_checked() {
    using Config = GemmConfig<GemmShape{.tile_m = 128, .tile_n = 64, .num_stages = 2, .uses_cp_async = true}>;
    GroupedGemmProblem problem{};
    const auto expect_refused = [&](const std::string& text) {
        expect_throws<std::invalid_argument>(text, [&] { make_arguments<Config>(problem, StoreEpilogue{}); });
    };
    expect_refused("row_indices must be given");
    const int32_t row_index = 0;
    problem.row_indices = &row_index;
    problem.depth = 12;
    expect_refused("depth must be a positive multiple of 8 (16-byte rows), got 12");
    problem.depth = 16;
    problem.num_columns = 6;
    expect_refused("num_columns must be a positive multiple of 8 (16-byte rows), got 6");
    problem.num_columns = 8;
    problem.a_stride = 20;
    expect_refused("a_stride must be a positive multiple of 8 (16-byte rows), got 20");
}

constexpr Schedule kPingPong = Schedule::kPingPong;

}  // namespace
}  // namespace moetrain::test

int main() {
    using namespace moetrain;
    using namespace moetrain::sm90;
    using namespace moetrain::test;
    const std::vector<int> uneven{37, 0, 130, 1, 128};

    Runner runner;
    runner.run("arguments are checked", arguments_are_checked);
    check_gemm<Hopper<GemmShape{.tile_m = 64, .tile_n = 128, .num_stages = 3, .num_consumers = 1}>>(
        runner, "TMA, 1 consumer", {uneven, 256, 192});
    check_gemm<Hopper<GemmShape{.tile_m = 128, .tile_n = 256, .num_stages = 2}>>(
        runner, "TMA, 2 consumers, 256 columns", {uneven, 256, 128});
    check_gemm<Hopper<GemmShape{.tile_m = 128, .tile_n = 128, .num_stages = 3, .uses_cp_async = true}>>(
        runner, "gather, K and N not multiples of the tile, gaps",
        {.group_sizes = uneven, .num_columns = 200, .depth = 136, .gap = 8});
    check_gemm<Hopper<GemmShape{.tile_m = 128, .tile_n = 128, .num_stages = 2, .major_b = Major::kMn}>>(
        runner, "MN-major B, TMA, gaps", {.group_sizes = {70, 0, 1, 129}, .num_columns = 200, .depth = 136, .gap = 16});
    check_gemm<
        Hopper<GemmShape{.tile_m = 64, .tile_n = 96, .num_stages = 3, .uses_cp_async = true, .schedule = kPingPong}>>(
        runner, "ping-pong, gather, odd number of tiles",
        {.group_sizes = {65, 0, 1, 130}, .num_columns = 104, .depth = 200, .num_blocks = 1});
    check_gemm<Hopper<GemmShape{.tile_m = 128,
                                .tile_n = 64,
                                .num_stages = 3,
                                .major_b = Major::kMn,
                                .uses_cp_async = true,
                                .schedule = kPingPong}>>(
        runner, "ping-pong, gather, MN-major B, 2 row blocks, bias",
        {.group_sizes = {129, 0, 1, 30}, .num_columns = 72, .depth = 200, .has_bias = true});
    check_gemm<Hopper<GemmShape{.tile_m = 64, .tile_n = 64, .num_stages = 4, .num_consumers = 1}>>(
        runner, "one token, more blocks than tiles, bias",
        {.group_sizes = {0, 1, 0}, .num_columns = 72, .depth = 64, .num_blocks = 5, .has_bias = true});
    check_gemm<Hopper<GemmShape{.tile_m = 64, .tile_n = 64, .num_stages = 4, .num_consumers = 1}>>(runner, "no rows",
                                                                                                   {{0, 0}, 64, 64});
    return runner.exit_code();
}
