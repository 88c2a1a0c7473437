// Ampere's grouped GEMM with groups along M, under emulation.
#include <set>
#include <vector>

#include "grouped_gemm_case.h"
#include "launch_sm80.h"

namespace moetrain::test {
namespace {

using namespace moetrain::sm80;

void arguments_are_checked() {
    using Config = GemmConfig<GemmShape{.tile_m = 128, .tile_n = 64, .num_stages = 2}>;
    GroupedGemmProblem problem{};
    const auto expect_refused = [&](const std::string& text) {
        expect_throws<std::invalid_argument>(text, [&] { make_arguments<Config>(problem, StoreEpilogue{}); });
    };
    problem.depth = 12;
    expect_refused("depth must be a positive multiple of 8 (16-byte rows), got 12");
    problem.depth = 16;
    problem.num_columns = 6;
    expect_refused("num_columns must be a positive multiple of 8 (16-byte rows), got 6");
    problem.num_columns = 8;
    problem.a_stride = 20;
    expect_refused("a_stride must be a positive multiple of 8 (16-byte rows), got 20");
    problem.a_stride = int64_t{1} << 31;
    expect_refused("a_stride must be below 2^31, got 2147483648");
    problem.a_stride = 0;
    problem.b_row_stride = 9;
    expect_refused("b_row_stride must be a positive multiple of 8 (16-byte rows), got 9");
    problem.b_row_stride = 0;
    problem.b_slot_stride = 4;
    expect_refused("b_slot_stride must be a positive multiple of 8 (16-byte rows), got 4");
    problem.b_slot_stride = 0;
    problem.b = reinterpret_cast<const Bf16*>(uintptr_t{24});
    expect_refused("b must be at a multiple of 16 bytes");
}

// No place is taken twice, none is outside, and moving agrees with starting there.
template <Major kMajor>
void check_layout() {
    constexpr int kWidth = 128;
    constexpr int kStepMn = kMajor == Major::kK ? 1 : kChunkElements;
    constexpr int kStepK = kMajor == Major::kK ? kChunkElements : 1;
    std::set<int> offsets;
    for (int mn = 0; mn < kWidth; mn += kStepMn)
        for (int k = 0; k < kStepDepth; k += kStepK) {
            const int offset = chunk_offset<kMajor>(mn, k);
            expect(offset >= 0 && offset < kWidth * kStepDepth * 2 && offset % kChunkBytes == 0, "outside the tile");
            offsets.insert(offset);
            const int from_origin =
                moved_chunk_offset<kMajor>(chunk_offset<kMajor>(mn % 16, k % 16), mn - mn % 16, k - k % 16);
            expect(from_origin == offset, "moved to " + std::to_string(mn) + ", " + std::to_string(k) + ": " +
                                              std::to_string(from_origin) + " is not " + std::to_string(offset));
        }
    expect(offsets.size() == kWidth * kStepDepth / kChunkElements, "two chunks in one place");
}

constexpr GemmShape large_tiles(Major major_b) {
    return {.tile_m = 128, .tile_n = 256, .num_stages = 4, .major_b = major_b};
}
constexpr GemmShape two_blocks(Major major_b) {
    return {.tile_m = 128, .tile_n = 128, .num_stages = 3, .blocks_per_multiprocessor = 2, .major_b = major_b};
}
constexpr GemmShape small_tiles(Major major_b) {
    return {.tile_m = 64, .tile_n = 64, .num_stages = 2, .warp_m = 32, .warp_n = 32, .major_b = major_b};
}

}  // namespace
}  // namespace moetrain::test

int main() {
    using namespace moetrain;
    using namespace moetrain::test;
    constexpr bool kInPlace = false;
    Runner runner;
    runner.run("arguments are checked", arguments_are_checked);
    runner.run("K-major tiles are laid out", check_layout<Major::kK>);
    runner.run("MN-major tiles are laid out", check_layout<Major::kMn>);
    check_gemm<Ampere<large_tiles(Major::kK)>>(
        runner, "gather, 256 columns, gaps",
        {.group_sizes = {37, 0, 130, 1}, .num_columns = 264, .depth = 136, .gap = 8});
    check_gemm<Ampere<two_blocks(Major::kK), kInPlace>>(
        runner, "in place, bias",
        {.group_sizes = {37, 0, 130, 1}, .num_columns = 200, .depth = 192, .num_blocks = 3, .has_bias = true});
    check_gemm<Ampere<two_blocks(Major::kMn)>>(
        runner, "gather, MN-major B, gaps",
        {.group_sizes = {129, 0, 1, 30}, .num_columns = 136, .depth = 200, .gap = 16});
    check_gemm<Ampere<large_tiles(Major::kMn), kInPlace>>(
        runner, "in place, MN-major B, 256 columns",
        {.group_sizes = {40, 1}, .num_columns = 320, .depth = 72, .num_blocks = 1});
    check_gemm<Ampere<small_tiles(Major::kK)>>(
        runner, "small tiles, one step each, one block",
        {.group_sizes = {65, 0, 1, 130}, .num_columns = 136, .depth = 24, .num_blocks = 1});
    check_gemm<Ampere<small_tiles(Major::kMn)>>(
        runner, "small tiles, MN-major B, bias",
        {.group_sizes = {70, 3}, .num_columns = 72, .depth = 40, .num_blocks = 1, .has_bias = true});
    check_gemm<Ampere<small_tiles(Major::kK), kInPlace>>(
        runner, "one token, more blocks than tiles",
        {.group_sizes = {0, 1, 0}, .num_columns = 72, .depth = 64, .num_blocks = 5});
    check_gemm<Ampere<small_tiles(Major::kK)>>(runner, "no rows", {{0, 0}, 64, 64});
    return runner.exit_code();
}
