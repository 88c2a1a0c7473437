// The grouped GEMM with groups along M, under emulation, against a float64 reference.
#include <random>
#include <vector>

#include "cuda/grouped_gemm_sm90/arguments.h"
#include "gemm_case.h"

namespace moetrain::test {
namespace {

using namespace moetrain::sm90;

struct Case {
    std::vector<int> group_sizes;
    int num_columns;
    int depth;
    int num_blocks = 2;
    bool has_bias = false;
    int gap = 0;  // elements between rows of A and of B
};

template <class Config>
struct Gemm {
    static constexpr bool kGather = Config::kUsesCpAsync;
    static constexpr bool kMnMajor = Config::kMajorB == Major::kMn;

    const Case& test;
    std::vector<int32_t> offsets = offsets_of(test.group_sizes);
    int num_groups = static_cast<int>(test.group_sizes.size());
    int num_rows = offsets.back();
    int num_a_rows = kGather ? num_rows / 2 + 3 : std::max(num_rows, 1);
    int num_slots = num_groups + 1;  // one is nobody's
    int64_t a_stride = test.depth + test.gap;
    int64_t b_stride = (kMnMajor ? test.num_columns : test.depth) + test.gap;
    int64_t slot_stride = b_stride * (kMnMajor ? test.depth : test.num_columns);
    Bf16Buffer a{static_cast<size_t>(num_a_rows * a_stride)};
    Bf16Buffer b{static_cast<size_t>(num_slots * slot_stride)};
    Bf16Buffer bias{static_cast<size_t>(num_slots * test.num_columns)};
    FloatBuffer weight{static_cast<size_t>(num_rows)};
    Bf16Buffer out{static_cast<size_t>(num_rows) * test.num_columns, static_cast<size_t>(128 * test.num_columns)};
    std::vector<int32_t> slots;
    std::vector<int32_t> row_indices;

    Gemm(const Case& given, uint64_t seed) : test(given) {
        std::mt19937_64 random(seed);
        a.fill_random(random, 1.0f);
        b.fill_random(random, 3.0f / std::sqrt(static_cast<float>(test.depth)));  // products of unit scale
        bias.fill_random(random, 1.0f);
        weight.fill_random(random, 1.0f);
        for (int group_idx = 0; group_idx < num_groups; ++group_idx)
            slots.push_back(kGather ? num_groups - group_idx : group_idx);
        for (int row = 0; row < num_rows; ++row)
            row_indices.push_back(kGather ? static_cast<int32_t>(random() % num_a_rows) : row);
    }

    void run(Timing timing, uint64_t seed) {
        const GroupedGemmProblem problem{
            .a = a.data(),
            .b = b.data(),
            .row_indices = kGather ? row_indices.data() : nullptr,
            .group_offsets = offsets.data(),
            .slots = kGather ? slots.data() : nullptr,
            .num_a_rows = num_a_rows,
            .num_groups = num_groups,
            .num_slots = num_slots,
            .num_columns = test.num_columns,
            .depth = test.depth,
            .a_stride = a_stride,
            .b_row_stride = b_stride,
            .b_slot_stride = slot_stride,
        };
        const StoreEpilogue epilogue{.out = out.data(),
                                     .num_columns = test.num_columns,
                                     .bias = test.has_bias ? bias.data() : nullptr,
                                     .bias_stride = test.num_columns,
                                     .weight = test.has_bias ? weight.data() : nullptr};
        const auto arguments = make_arguments<Config>(problem, epilogue);
        emulation::run_grid({.num_blocks = test.num_blocks,
                             .num_threads = Config::kNumThreads,
                             .shared_bytes = sizeof(PipelineStorage<Config>),
                             .seed = seed,
                             .timing = timing,
                             .tensors = {a.range(), b.range()}},
                            [&] { grouped_gemm_kernel<Config, StoreEpilogue>(arguments); });
    }

    Sum product(int row, int slot, int column) {
        Sum sum;
        for (int k = 0; k < test.depth; ++k) {
            const int64_t b_index = kMnMajor ? k * b_stride + column : column * b_stride + k;
            sum.add(to_double(a[row_indices[row] * a_stride + k]), to_double(b[slot * slot_stride + b_index]));
        }
        return sum;
    }

    void check() {
        out.expect_untouched_from(out.size(), "out");
        for (int group_idx = 0; group_idx < num_groups; ++group_idx)
            for (int row = offsets[group_idx]; row < offsets[group_idx + 1]; ++row)
                for (int column = 0; column < test.num_columns; ++column) {
                    const int slot = slots[group_idx];
                    const Sum sum = product(row, slot, column);
                    const double own_bias = to_double(bias[slot * test.num_columns + column]);
                    expect_near(to_double(out[static_cast<size_t>(row) * test.num_columns + column]),
                                sum.value + (test.has_bias ? weight[row] * own_bias : 0),
                                sum.fp32_error() + (test.has_bias ? 0x1p-22 : 0), true,
                                at("group " + std::to_string(group_idx), row, column));
                }
    }
};

template <class Config>
void check_gemm(Runner& runner, const std::string& name, const Case& test) {
    check_all_timings(runner, name, [&](Timing timing, uint64_t seed) {
        Gemm<Config> gemm(test, seed);
        gemm.run(timing, seed);
        gemm.check();
    });
}

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
    check_gemm<GemmConfig<GemmShape{.tile_m = 64, .tile_n = 128, .num_stages = 3, .num_consumers = 1}>>(
        runner, "TMA, 1 consumer", {uneven, 256, 192});
    check_gemm<GemmConfig<GemmShape{.tile_m = 128, .tile_n = 256, .num_stages = 2}>>(
        runner, "TMA, 2 consumers, 256 columns", {uneven, 256, 128});
    check_gemm<GemmConfig<GemmShape{.tile_m = 128, .tile_n = 128, .num_stages = 3, .uses_cp_async = true}>>(
        runner, "gather, K and N not multiples of the tile, gaps",
        {.group_sizes = uneven, .num_columns = 200, .depth = 136, .gap = 8});
    check_gemm<GemmConfig<GemmShape{.tile_m = 128, .tile_n = 128, .num_stages = 2, .major_b = Major::kMn}>>(
        runner, "MN-major B, TMA, gaps", {.group_sizes = {70, 0, 1, 129}, .num_columns = 200, .depth = 136, .gap = 16});
    check_gemm<GemmConfig<GemmShape{
        .tile_m = 64, .tile_n = 96, .num_stages = 3, .uses_cp_async = true, .schedule = kPingPong}>>(
        runner, "ping-pong, gather, odd number of tiles",
        {.group_sizes = {65, 0, 1, 130}, .num_columns = 104, .depth = 200, .num_blocks = 1});
    check_gemm<GemmConfig<GemmShape{.tile_m = 128,
                                    .tile_n = 64,
                                    .num_stages = 3,
                                    .major_b = Major::kMn,
                                    .uses_cp_async = true,
                                    .schedule = kPingPong}>>(
        runner, "ping-pong, gather, MN-major B, 2 row blocks, bias",
        {.group_sizes = {129, 0, 1, 30}, .num_columns = 72, .depth = 200, .has_bias = true});
    check_gemm<GemmConfig<GemmShape{.tile_m = 64, .tile_n = 64, .num_stages = 4, .num_consumers = 1}>>(
        runner, "one token, more blocks than tiles, bias",
        {.group_sizes = {0, 1, 0}, .num_columns = 72, .depth = 64, .num_blocks = 5, .has_bias = true});
    check_gemm<GemmConfig<GemmShape{.tile_m = 64, .tile_n = 64, .num_stages = 4, .num_consumers = 1}>>(
        runner, "no rows", {{0, 0}, 64, 64});
    return runner.exit_code();
}
