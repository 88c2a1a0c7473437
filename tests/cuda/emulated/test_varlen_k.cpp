// The grouped GEMM with groups along K, under emulation, against a float64 reference.
#include <random>
#include <set>
#include <tuple>
#include <type_traits>
#include <vector>

#include "cuda/grouped_gemm_sm90/arguments.h"
#include "gemm_case.h"

namespace moetrain::test {
namespace {

using namespace moetrain::sm90;

struct Case {
    std::vector<int> group_sizes;
    int a_width;
    int b_width;
    bool gathers_a = false;
    bool gathers_b = false;
    std::vector<int> slots = {};  // of each group; none: its own
    int num_slots = 0;            // with `slots`
    int num_blocks = 2;
};

// The lists of groups of each slot.
struct SlotLists {
    std::vector<int32_t> offsets{0};
    std::vector<int32_t> groups;

    SlotLists(const std::vector<int>& slots, int num_slots) {
        for (int slot = 0; slot < num_slots; ++slot) {
            for (size_t group_idx = 0; group_idx < slots.size(); ++group_idx)
                if (slots[group_idx] == slot) groups.push_back(static_cast<int32_t>(group_idx));
            offsets.push_back(static_cast<int32_t>(groups.size()));
        }
    }
};

// How a case stores: bf16, fp32, or added to fp32.
enum class Output { kBf16, kFloat, kAdded };

template <class Config, Output kOutput>
struct Gemm {
    // Rows of what a kernel must not take into a sum: beyond the last group, NaN.
    static constexpr int kNumRowsBeyond = 70;

    const Case& test;
    std::vector<int32_t> offsets = offsets_of(test.group_sizes);
    int num_rows = offsets.back();
    int num_slots = test.slots.empty() ? static_cast<int>(test.group_sizes.size()) : test.num_slots;
    SlotLists lists{test.slots, num_slots};
    std::mt19937_64 random;
    Bf16Buffer a;
    Bf16Buffer b;
    std::vector<int32_t> a_rows;
    std::vector<int32_t> b_rows;
    using Element = std::conditional_t<kOutput == Output::kBf16, Bf16, float>;
    Buffer<Element> out{static_cast<size_t>(num_slots) * test.a_width * test.b_width,
                        static_cast<size_t>(128 * test.b_width)};
    std::vector<double> before = std::vector<double>(out.size());

    static int num_stored(int num_rows, bool gathers) { return gathers ? num_rows / 2 + 3 : num_rows + kNumRowsBeyond; }

    Gemm(const Case& given, uint64_t seed)
        : test(given),
          random(seed),
          a(static_cast<size_t>(num_stored(num_rows, test.gathers_a)) * (test.a_width + 8)),
          b(static_cast<size_t>(num_stored(num_rows, test.gathers_b)) * test.b_width) {
        fill(a, test.a_width + 8, test.gathers_a, a_rows);
        fill(b, test.b_width, test.gathers_b, b_rows);
        for (size_t i = 0; kOutput == Output::kAdded && i < out.size(); ++i) {
            before[i] = static_cast<double>(random() % 64) - 32;
            if constexpr (kOutput == Output::kAdded) out[i] = static_cast<float>(before[i]);
        }
    }

    // A stored row that no pair names stays NaN, too.
    void fill(Bf16Buffer& buffer, int stride, bool gathers, std::vector<int32_t>& rows) {
        buffer.fill_random(random, 1.0f);
        const int num_random = num_stored(num_rows, gathers) - (gathers ? 1 : kNumRowsBeyond);
        for (int row = 0; row < num_rows; ++row)
            rows.push_back(gathers ? static_cast<int32_t>(random() % num_random) : row);
        for (size_t i = static_cast<size_t>(num_random) * stride; i < buffer.size(); ++i)
            buffer[i] = {0x7FC0};
    }

    void run(Timing timing, uint64_t seed) {
        const VarlenKProblem problem{.a = {.data = a.data(),
                                           .num_rows = num_stored(num_rows, test.gathers_a),
                                           .width = test.a_width,
                                           .stride = test.a_width + 8,
                                           .row_indices = test.gathers_a ? a_rows.data() : nullptr},
                                     .b = {.data = b.data(),
                                           .num_rows = num_stored(num_rows, test.gathers_b),
                                           .width = test.b_width,
                                           .row_indices = test.gathers_b ? b_rows.data() : nullptr},
                                     .group_offsets = offsets.data(),
                                     .slot_offsets = test.slots.empty() ? nullptr : lists.offsets.data(),
                                     .slot_groups = test.slots.empty() ? nullptr : lists.groups.data(),
                                     .num_slots = num_slots};
        if constexpr (kOutput == Output::kBf16)
            run(make_varlen_k_arguments<Config>(problem, StoreEpilogue{.out = out.data(), .num_columns = test.b_width}),
                timing, seed);
        else
            run(make_varlen_k_arguments<Config>(problem,
                                                FloatEpilogue{out.data(), test.b_width, kOutput == Output::kAdded}),
                timing, seed);
    }

    template <class Epilogue>
    void run(const VarlenKArguments<Epilogue>& arguments, Timing timing, uint64_t seed) {
        emulation::run_grid({.num_blocks = test.num_blocks,
                             .num_threads = Config::kNumThreads,
                             .shared_bytes = sizeof(PipelineStorage<Config>),
                             .seed = seed,
                             .timing = timing,
                             .tensors = {a.range(), b.range()}},
                            [&] { varlen_k_gemm_kernel<Config, Epilogue>(arguments); });
    }

    void check() {
        out.expect_untouched_from(out.size(), "out");
        for (int slot = 0; slot < num_slots; ++slot)
            for (int i = 0; i < test.a_width; ++i)
                for (int j = 0; j < test.b_width; ++j)
                    check_value(slot, i, j);
    }

    void check_value(int slot, int i, int j) {
        Sum sum;
        for (size_t group_idx = 0; group_idx < test.group_sizes.size(); ++group_idx) {
            if ((test.slots.empty() ? static_cast<int>(group_idx) : test.slots[group_idx]) != slot) continue;
            for (int row = offsets[group_idx]; row < offsets[group_idx + 1]; ++row)
                sum.add(to_double(a[a_rows[row] * (test.a_width + 8) + i]),
                        to_double(b[b_rows[row] * test.b_width + j]));
        }
        const size_t place = (static_cast<size_t>(slot) * test.a_width + i) * test.b_width + j;
        expect_near(to_double(out[place]), before[place] + sum.value,
                    sum.fp32_error() + std::abs(before[place]) * 0x1p-23, kOutput == Output::kBf16,
                    at("slot " + std::to_string(slot), i, j));
    }
};

template <class Config, Output kOutput = Output::kBf16>
void check_gemm(Runner& runner, const std::string& name, const Case& test) {
    check_all_timings(runner, name, [&](Timing timing, uint64_t seed) {
        Gemm<Config, kOutput> gemm(test, seed);
        gemm.run(timing, seed);
        gemm.check();
    });
}

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
    check_gemm<GemmConfig<kLarge>>(runner, "gathered B, 2 consumers",
                                   {.group_sizes = {70, 0, 129, 1}, .a_width = 136, .b_width = 264, .gathers_b = true});
    check_gemm<GemmConfig<kSmall>>(runner, "gathered A, shared and empty slots",
                                   {.group_sizes = {3, 64, 0, 130, 1, 65},
                                    .a_width = 72,
                                    .b_width = 104,
                                    .gathers_a = true,
                                    .slots = {4, 1, 0, 1, 4, 2},
                                    .num_slots = 6});
    check_gemm<GemmConfig<kSmall>>(runner, "nothing gathered, more blocks than tiles",
                                   {.group_sizes = {128, 60}, .a_width = 64, .b_width = 40, .num_blocks = 5});
    check_gemm<GemmConfig<kSmall>>(
        runner, "both gathered",
        {.group_sizes = {1, 66}, .a_width = 8, .b_width = 80, .gathers_a = true, .gathers_b = true});
    check_gemm<GemmConfig<kSmall>>(
        runner, "empty slots between long ones, one block",
        {.group_sizes = {0, 300, 0, 0, 290, 0, 65}, .a_width = 64, .b_width = 64, .gathers_b = true, .num_blocks = 1});
    check_gemm<GemmConfig<kSmall>, Output::kFloat>(
        runner, "stored as fp32", {.group_sizes = {0, 70, 1}, .a_width = 72, .b_width = 72, .gathers_b = true});
    check_gemm<GemmConfig<kSmall>, Output::kAdded>(
        runner, "added to fp32", {.group_sizes = {65, 0, 3}, .a_width = 40, .b_width = 136, .gathers_a = true});
    check_gemm<GemmConfig<kSmall>>(runner, "no rows", {.group_sizes = {0, 0}, .a_width = 16, .b_width = 24});
    return runner.exit_code();
}
