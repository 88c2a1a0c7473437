// The sums around an expert MLP's products, under emulation, against a float64 reference.
#include <random>
#include <vector>

#include "cuda/expert_mlp/sums.h"
#include "gemm_case.h"

namespace moetrain::test {
namespace {

using namespace moetrain::experts;

emulation::GridOptions grid(int num_blocks, int num_threads, int shared_bytes, Timing timing, uint64_t seed) {
    return {.num_blocks = num_blocks,
            .num_threads = num_threads,
            .shared_bytes = static_cast<size_t>(shared_bytes),
            .seed = seed,
            .timing = timing};
}

void check_pair_sum(int num_rows, int width, int max_pairs_per_row, Timing timing, uint64_t seed) {
    std::mt19937_64 random(seed);
    std::vector<int32_t> row_begins{0};
    for (int row = 0; row < num_rows; ++row)
        row_begins.push_back(row_begins.back() + static_cast<int32_t>(random() % (max_pairs_per_row + 1)));
    const int num_pairs = row_begins.back();
    Bf16Buffer y(static_cast<size_t>(std::max(num_pairs, 1)) * width);
    Bf16Buffer out(static_cast<size_t>(num_rows) * width, static_cast<size_t>(width));
    y.fill_random(random, 1.0f);
    std::vector<int32_t> pairs(num_pairs);
    for (int i = 0; i < num_pairs; ++i)
        pairs[i] = (i * 7 + 3) % num_pairs;
    const PairSumArguments arguments{.y = y.data(),
                                     .row_begins = row_begins.data(),
                                     .pairs = pairs.data(),
                                     .out = out.data(),
                                     .num_rows = num_rows,
                                     .width = width};
    run_grid(grid(3, kPairSumThreads, 0, timing, seed), [&] { pair_sum_kernel(arguments); });

    out.expect_untouched_from(out.size(), "out");
    for (int row = 0; row < num_rows; ++row)
        for (int column = 0; column < width; ++column) {
            // Bit for bit: fp32, in the order of the list.
            float sum = 0;
            for (int i = row_begins[row]; i < row_begins[row + 1]; ++i)
                sum += static_cast<float>(to_double(y[static_cast<size_t>(pairs[i]) * width + column]));
            const auto bits = static_cast<uint16_t>(ptx::pack_bf16x2(sum, 0));
            expect(out[static_cast<size_t>(row) * width + column].bits == bits, at("pair sum", row, column));
        }
}

struct WeightGradCase {
    std::vector<int> group_sizes;
    int num_beyond;  // capacity beyond the last group
    int num_parts;
    int width;
    bool has_bias;
    bool has_slots;
};

void check_weight_grad(const WeightGradCase& test, Timing timing, uint64_t seed) {
    std::mt19937_64 random(seed);
    const std::vector<int32_t> offsets = offsets_of(test.group_sizes);
    const int num_groups = static_cast<int>(test.group_sizes.size());
    const int length = offsets.back();
    const int num_pairs = length + test.num_beyond;
    const int num_tokens = length / 2 + 2;
    FloatBuffer parts(static_cast<size_t>(test.num_parts) * num_pairs);
    FloatBuffer out(static_cast<size_t>(num_pairs), 64);
    Bf16Buffer bias(static_cast<size_t>(num_groups) * (test.width + 8));
    Bf16Buffer dy(static_cast<size_t>(num_tokens) * (test.width + 16));
    parts.fill_random(random, 1.0f);
    for (int i = 0; i < test.num_parts; ++i)  // what the products leave unwritten
        for (int pair = length; pair < num_pairs; ++pair)
            parts[i * num_pairs + pair] = NAN;
    bias.fill_random(random, 1.0f);
    dy.fill_random(random, 1.0f);
    std::vector<int32_t> slots;
    for (int group_idx = 0; group_idx < num_groups; ++group_idx)
        slots.push_back(test.has_slots ? num_groups - 1 - group_idx : group_idx);
    std::vector<int32_t> row_indices(num_pairs, 1 << 30);
    for (int pair = 0; pair < length; ++pair)
        row_indices[pair] = static_cast<int32_t>(random() % num_tokens);
    const WeightGradArguments arguments{.parts = parts.data(),
                                        .out = out.data(),
                                        .num_parts = test.num_parts,
                                        .num_pairs = num_pairs,
                                        .group_offsets = offsets.data(),
                                        .num_groups = num_groups,
                                        .bias = test.has_bias ? bias.data() : nullptr,
                                        .bias_stride = test.width + 8,
                                        .slots = test.has_slots ? slots.data() : nullptr,
                                        .dy = dy.data(),
                                        .dy_stride = test.width + 16,
                                        .row_indices = row_indices.data(),
                                        .width = test.width};
    run_grid(grid(2, kWeightGradThreads, 0, timing, seed), [&] { weight_grad_kernel(arguments); });

    out.expect_untouched_from(out.size(), "out");
    for (int group_idx = 0; group_idx < num_groups; ++group_idx)
        for (int pair = offsets[group_idx]; pair < offsets[group_idx + 1]; ++pair) {
            Sum sum;
            for (int i = 0; i < test.num_parts; ++i)
                sum.add(parts[i * num_pairs + pair], 1);
            for (int column = 0; test.has_bias && column < test.width; ++column)
                sum.add(to_double(dy[row_indices[pair] * (test.width + 16) + column]),
                        to_double(bias[slots[group_idx] * (test.width + 8) + column]));
            expect_near(out[pair], sum.value, sum.fp32_error(), false, at("weight gradient", pair, 0));
        }
    for (int pair = length; pair < num_pairs; ++pair)
        expect(out[pair] == 0, at("weight gradient beyond the last group", pair, 0));
}

struct SlotSumCase {
    std::vector<int> group_sizes;
    int width;
    bool gathers;
    bool has_weight;
    std::vector<int32_t> slot_offsets = {};
    std::vector<int32_t> slot_groups = {};
};

void check_slot_sum(const SlotSumCase& test, Timing timing, uint64_t seed) {
    std::mt19937_64 random(seed);
    const std::vector<int32_t> offsets = offsets_of(test.group_sizes);
    const bool has_lists = !test.slot_offsets.empty();
    const int num_slots = static_cast<int>(has_lists ? test.slot_offsets.size() - 1 : test.group_sizes.size());
    const int length = offsets.back();
    const int num_stored = test.gathers ? length / 2 + 2 : length + 5;
    const int stride = test.width + 8;
    Bf16Buffer data(static_cast<size_t>(num_stored) * stride);
    FloatBuffer weight(static_cast<size_t>(length));
    Bf16Buffer out(static_cast<size_t>(num_slots) * test.width, 64);
    data.fill_random(random, 1.0f);
    weight.fill_random(random, 1.0f);
    std::vector<int32_t> row_indices;
    for (int row = 0; row < length; ++row)
        row_indices.push_back(test.gathers ? static_cast<int32_t>(random() % num_stored) : row);
    const SlotSumArguments arguments{.data = data.data(),
                                     .data_stride = stride,
                                     .row_indices = test.gathers ? row_indices.data() : nullptr,
                                     .weight = test.has_weight ? weight.data() : nullptr,
                                     .group_offsets = offsets.data(),
                                     .slot_offsets = has_lists ? test.slot_offsets.data() : nullptr,
                                     .slot_groups = has_lists ? test.slot_groups.data() : nullptr,
                                     .out = out.data(),
                                     .num_slots = num_slots,
                                     .width = test.width};
    run_grid(grid(2, kSlotSumThreads, kSlotSumSharedBytes, timing, seed), [&] { slot_sum_kernel(arguments); });

    out.expect_untouched_from(out.size(), "out");
    for (int slot = 0; slot < num_slots; ++slot)
        for (int column = 0; column < test.width; ++column) {
            Sum sum;
            const int end = has_lists ? test.slot_offsets[slot + 1] : slot + 1;
            for (int i = has_lists ? test.slot_offsets[slot] : slot; i < end; ++i) {
                const int group_idx = has_lists ? test.slot_groups[i] : i;
                for (int row = offsets[group_idx]; row < offsets[group_idx + 1]; ++row)
                    sum.add(to_double(data[row_indices[row] * stride + column]), test.has_weight ? weight[row] : 1.0);
            }
            expect_near(to_double(out[slot * test.width + column]), sum.value, sum.fp32_error(), true,
                        at("slot sum", slot, column));
        }
}

}  // namespace
}  // namespace moetrain::test

int main() {
    using namespace moetrain::test;
    Runner runner;
    const auto check = [&](const char* name, const auto& body) { check_all_timings(runner, name, body); };
    check("pairs of rows", [](auto timing, auto seed) { check_pair_sum(23, 72, 9, timing, seed); });
    check("pairs of wide rows", [](auto timing, auto seed) { check_pair_sum(5, 1160, 3, timing, seed); });
    check("rows without pairs", [](auto timing, auto seed) { check_pair_sum(4, 8, 0, timing, seed); });
    check("weight gradient", [](auto timing, auto seed) {
        check_weight_grad({{37, 0, 200, 1, 64}, 40, 3, 16, false, false}, timing, seed);
    });
    check("weight gradient, bias, slots", [](auto timing, auto seed) {
        check_weight_grad({{0, 33, 0, 100, 1, 0}, 30, 1, 264, true, true}, timing, seed);
    });
    check("weight gradient, bias",
          [](auto timing, auto seed) { check_weight_grad({{1, 2}, 0, 2, 8, true, false}, timing, seed); });
    check("slots in place",
          [](auto timing, auto seed) { check_slot_sum({{70, 0, 1, 33}, 136, false, false}, timing, seed); });
    check("slots gathered and weighted, shared and empty", [](auto timing, auto seed) {
        check_slot_sum({{5, 40, 0, 64}, 72, true, true, {0, 2, 2, 3, 4}, {1, 3, 2, 0}}, timing, seed);
    });
    return runner.exit_code();
}
