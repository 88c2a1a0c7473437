// The grouped GEMM with groups along M, against a float64 reference, over any architecture (`Launch`).
#pragma once

#include <random>
#include <vector>

#include "cuda/grouped_gemm/epilogue.h"
#include "cuda/grouped_gemm/problem.h"
#include "gemm_case.h"

namespace moetrain::test {

struct Case {
    std::vector<int> group_sizes;
    int num_columns;
    int depth;
    int num_blocks = 2;
    bool has_bias = false;
    int gap = 0;  // elements between rows of A, rows of B and slots of B
};

template <class Launch>
struct Gemm {
    static constexpr bool kGather = Launch::kGathers;
    static constexpr bool kMnMajor = Launch::kIsMnMajor;

    const Case& test;
    std::vector<int32_t> offsets = offsets_of(test.group_sizes);
    int num_groups = static_cast<int>(test.group_sizes.size());
    int num_rows = offsets.back();
    int num_a_rows = kGather ? num_rows / 2 + 3 : std::max(num_rows, 1);
    int num_slots = num_groups + 1;  // one is nobody's
    int64_t a_stride = test.depth + test.gap;
    int64_t b_stride = (kMnMajor ? test.num_columns : test.depth) + test.gap;
    int64_t slot_stride = b_stride * (kMnMajor ? test.depth : test.num_columns) + test.gap;
    int64_t bias_stride = test.num_columns + 8;
    Bf16Buffer a{static_cast<size_t>(num_a_rows * a_stride)};
    Bf16Buffer b{static_cast<size_t>(num_slots * slot_stride)};
    Bf16Buffer bias{static_cast<size_t>(num_slots * bias_stride)};
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
        const gemm::GroupedGemmProblem problem{
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
        const gemm::StoreEpilogue epilogue{.out = out.data(),
                                           .num_columns = test.num_columns,
                                           .bias = test.has_bias ? bias.data() : nullptr,
                                           .bias_stride = bias_stride,
                                           .weight = test.has_bias ? weight.data() : nullptr};
        Launch::run_gemm(problem, epilogue, grid_of(test.num_blocks, timing, seed, {a.range(), b.range()}));
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
                    const double own_bias = to_double(bias[slot * bias_stride + column]);
                    expect_near(to_double(out[static_cast<size_t>(row) * test.num_columns + column]),
                                sum.value + (test.has_bias ? weight[row] * own_bias : 0),
                                sum.fp32_error() + (test.has_bias ? 0x1p-22 : 0), true,
                                at("group " + std::to_string(group_idx), row, column));
                }
    }
};

template <class Launch>
void check_gemm(Runner& runner, const std::string& name, const Case& test) {
    check_all_timings(runner, name, [&](Timing timing, uint64_t seed) {
        Gemm<Launch> gemm(test, seed);
        gemm.run(timing, seed);
        gemm.check();
    });
}

}  // namespace moetrain::test
