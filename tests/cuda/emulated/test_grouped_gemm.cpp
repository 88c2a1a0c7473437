// The grouped GEMM kernel, under emulation, against a float64 reference.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>
#include <sstream>
#include <vector>

#include "cuda/grouped_gemm_sm90/arguments.h"
#include "expect.h"
#include "tensors.h"

namespace moetrain::test {
namespace {

using emulation::Timing;
using namespace moetrain::sm90;

constexpr int kGuardRows = 128;  // a tile

struct Case {
    std::vector<int> group_sizes;
    int num_columns;
    int depth;
    Timing timing;
    uint64_t seed;
    int num_blocks = 2;
};

template <class Config, class Epilogue>
void check_grouped_gemm(const Case& test) {
    std::mt19937_64 random(test.seed);
    const int num_groups = static_cast<int>(test.group_sizes.size());
    std::vector<int32_t> group_offsets{0};
    for (const int size : test.group_sizes)
        group_offsets.push_back(group_offsets.back() + size);
    const int num_rows = group_offsets.back();
    const int num_a_rows = Config::kGatherA ? num_rows / 2 + 3 : std::max(num_rows, 1);
    const int num_out_columns = test.num_columns / Epilogue::kNumColumnBlocks;

    Bf16Buffer a(static_cast<size_t>(num_a_rows) * test.depth);
    const int num_slots = num_groups + 1;  // one is nobody's
    std::vector<int32_t> slots(num_groups);
    for (int group_idx = 0; group_idx < num_groups; ++group_idx)
        slots[group_idx] = Config::kGatherA ? num_groups - group_idx : group_idx;
    Bf16Buffer b(static_cast<size_t>(num_slots) * test.num_columns * test.depth);
    a.fill_random(random, 1.0f);
    b.fill_random(random, 3.0f / std::sqrt(static_cast<float>(test.depth)));  // products of unit scale
    std::vector<int32_t> row_indices(num_rows);
    for (int row = 0; row < num_rows; ++row)
        row_indices[row] = Config::kGatherA ? static_cast<int32_t>(random() % num_a_rows) : row;
    Bf16Buffer out(static_cast<size_t>(num_rows + 2 * kGuardRows) * num_out_columns);
    const size_t guard_size = static_cast<size_t>(kGuardRows) * num_out_columns;
    const size_t out_size = static_cast<size_t>(num_rows) * num_out_columns;
    for (size_t i = 0; i < out_size + 2 * guard_size; ++i)
        out[i].bits = kUntouched;

    const auto arguments = make_arguments<Config, Epilogue>({
        .a = a.data(),
        .b = b.data(),
        .out = out.data() + guard_size,
        .row_indices = Config::kGatherA ? row_indices.data() : nullptr,
        .group_offsets = group_offsets.data(),
        .slots = Config::kGatherA ? slots.data() : nullptr,
        .num_a_rows = num_a_rows,
        .num_groups = num_groups,
        .num_slots = num_slots,
        .num_columns = test.num_columns,
        .depth = test.depth,
    });
    emulation::run_grid({.num_blocks = test.num_blocks,
                         .num_threads = Config::kNumThreads,
                         .shared_bytes = sizeof(GroupedGemmStorage<Config>),
                         .seed = test.seed,
                         .timing = test.timing,
                         .tensors = {a.range(), b.range()}},
                        [&] { grouped_gemm_kernel<Config, Epilogue>(arguments); });

    for (size_t i = 0; i < guard_size; ++i)
        expect(out[i].bits == kUntouched && out[guard_size + out_size + i].bits == kUntouched,
               "a value outside the output was written");
    for (int group_idx = 0; group_idx < num_groups; ++group_idx) {
        for (int row = group_offsets[group_idx]; row < group_offsets[group_idx + 1]; ++row) {
            const auto dot = [&](int column, double& magnitude) {
                double sum = 0;
                magnitude = 0;
                for (int k = 0; k < test.depth; ++k) {
                    const double product =
                        static_cast<double>(to_float(a[static_cast<size_t>(row_indices[row]) * test.depth + k])) *
                        to_float(
                            b[(static_cast<size_t>(slots[group_idx]) * test.num_columns + column) * test.depth + k]);
                    sum += product;
                    magnitude += std::abs(product);
                }
                return sum;
            };
            for (int column = 0; column < num_out_columns; ++column) {
                double magnitude = 0;
                double expected = dot(column, magnitude);
                double accumulation_error = magnitude * test.depth * 0x1p-24;
                if constexpr (Epilogue::kNumColumnBlocks == 2) {
                    double up_magnitude = 0;
                    const double up = dot(num_out_columns + column, up_magnitude);
                    const double up_error = up_magnitude * test.depth * 0x1p-24;
                    const double silu = expected / (1 + std::exp(-expected));
                    // |silu'| <= 1.1; the device's exp is good to a few ulp
                    accumulation_error = 1.1 * accumulation_error * std::abs(up) + std::abs(silu) * up_error;
                    expected = silu * up;
                }
                const double tolerance = std::abs(expected) * 0x1.02p-8 + accumulation_error + 1e-30;
                const float actual = to_float(out[guard_size + static_cast<size_t>(row) * num_out_columns + column]);
                if (std::abs(actual - expected) <= tolerance) continue;  // false for NaN
                std::ostringstream message;
                message << "group " << group_idx << ", row " << row << ", column " << column << ": expected "
                        << expected << " within " << tolerance << ", got " << actual;
                throw std::runtime_error(message.str());
            }
        }
    }
}

template <class Config, class Epilogue>
void check_with_all_timings(Runner& runner, const std::string& name, Case test) {
    for (const Timing timing : {Timing::kEarly, Timing::kLate, Timing::kRandom}) {
        for (uint64_t seed = 1; seed <= (timing == Timing::kRandom ? 3 : 1); ++seed) {
            test.timing = timing;
            test.seed = seed;
            const auto start = std::chrono::steady_clock::now();
            std::ostringstream label;
            label << name << ", " << name_of(timing) << ", seed " << seed;
            runner.run(label.str(), [&] { check_grouped_gemm<Config, Epilogue>(test); });
            const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
            std::printf("      %.2f s\n", seconds.count());
        }
    }
}

}  // namespace
}  // namespace moetrain::test

int main() {
    using namespace moetrain::sm90;
    using namespace moetrain::test;
    constexpr bool kTma = false;
    constexpr bool kGather = true;
    const std::vector<int> uneven{37, 0, 130, 1, 128};

    Runner runner;
    check_with_all_timings<GroupedGemmConfig<128, 1, 3, kTma>, StoreEpilogue>(runner, "store, TMA, 1 consumer",
                                                                              {uneven, 256, 192, {}, {}});
    check_with_all_timings<GroupedGemmConfig<256, 2, 2, kTma>, StoreEpilogue>(
        runner, "store, TMA, 2 consumers, 256 columns", {uneven, 256, 128, {}, {}});
    check_with_all_timings<GroupedGemmConfig<128, 2, 3, kGather>, StoreEpilogue>(
        runner, "store, gather, K and N not multiples of the tile", {uneven, 200, 136, {}, {}});
    check_with_all_timings<GroupedGemmConfig<256, 2, 2, kGather>, SwigluEpilogue>(runner, "SwiGLU, gather, 2 consumers",
                                                                                  {uneven, 320, 192, {}, {}});
    check_with_all_timings<GroupedGemmConfig<64, 1, 4, kTma>, SwigluEpilogue>(
        runner, "SwiGLU, TMA, one token, more blocks than tiles", {{0, 1, 0}, 72, 64, {}, {}, 5});
    check_with_all_timings<GroupedGemmConfig<64, 1, 4, kTma>, StoreEpilogue>(runner, "store, TMA, no rows",
                                                                             {{0, 0}, 64, 64, {}, {}});
    return runner.exit_code();
}
