// The simple kernels, as they stand in their .cu files, against plain references.
//
// Kernel: rows/gather_rows.cu
// Kernel: routing/group_pairs.cu
// Kernel: grouped_gemm/simple/grouped_gemm.cu
// Kernel: grouped_gemm/simple/grouped_gemm_varlen_k.cu
// Kernel: rows/scatter_add_rows.cu
#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "cuda/grouped_gemm/simple/grouped_gemm.h"
#include "cuda/grouped_gemm/simple/grouped_gemm_varlen_k.h"
#include "cuda/routing/group_pairs.h"
#include "cuda/rows/gather_rows.h"
#include "cuda/rows/scatter_add_rows.h"
#include "cuda_runtime.h"
#include "expect.h"
#include "vectors.h"

namespace moetrain::test {
namespace {

// Rows of 6, 12 and 32 bytes: every width of load. The list ends before its capacity; rows of x lie apart.
void gather_rows(Random& random) {
    for (const auto& [width, stride] : {std::pair{3, 5}, {6, 8}, {16, 24}}) {
        const int num_rows = 37;
        const std::vector<int32_t> row = random_ids(random, num_rows, 0, 9);
        std::vector<int16_t> x(static_cast<size_t>(9 * stride));
        std::iota(x.begin(), x.end(), int16_t{1});
        std::vector<int16_t> y(static_cast<size_t>(num_rows * width), kGuard);
        const int32_t length = 33;
        std::vector<int16_t> expected = y;
        for (int i = 0; i < length; ++i)
            std::copy_n(x.begin() + row[i] * stride, width, expected.begin() + i * width);
        const auto status =
            launch_gather_rows(x.data(), 2 * stride, row.data(), &length, y.data(), num_rows, 2 * width, nullptr);
        expect(status == cudaSuccess, "launch_gather_rows failed");
        expect_equal(y, expected, "y of width " + std::to_string(width));
    }
}

void group_pairs(Random& random) {
    for (const auto& [num_pairs, num_experts] : {std::pair{2500, 5}, {1, 1}, {300, 300}}) {
        std::vector<int32_t> id = random_ids(random, num_pairs, -1, num_experts);
        std::vector<int32_t> pair(id.size(), kGuard);
        std::vector<int32_t> offset(static_cast<size_t>(num_experts) + 1, kGuard);
        std::vector<int32_t> scratch(static_cast<size_t>(group_pairs_scratch_size(num_pairs, num_experts)), kGuard);
        int64_t breach = kNoBreach;
        if (num_pairs > 1000) id[700] = num_experts + 3;
        launch_group_pairs(id.data(), num_pairs, num_experts, pair.data(), offset.data(), scratch.data(), &breach,
                           nullptr);

        std::vector<int32_t> expected(id.size());
        std::iota(expected.begin(), expected.end(), 0);
        const auto bucket = [&](int32_t p) { return id[p] < 0 || id[p] >= num_experts ? num_experts : id[p]; };
        std::stable_sort(expected.begin(), expected.end(), [&](int32_t a, int32_t b) { return bucket(a) < bucket(b); });
        std::vector<int32_t> expected_offset(offset.size());
        for (int32_t e = 0; e <= num_experts; ++e)
            expected_offset[e] = static_cast<int32_t>(
                std::count_if(expected.begin(), expected.end(), [&](int32_t p) { return bucket(p) < e; }));
        expect_equal(pair, expected, "pair");
        expect_equal(offset, expected_offset, "offset");
        expect(breach == (num_pairs > 1000 ? 700 : kNoBreach), "breach is " + std::to_string(breach));
    }
}

// Sums of small integers are exact in any order, so a lost or doubled pair shows; halves of weights keep them so.
void scatter_add_rows(Random& random) {
    const int num_pairs = 900;
    const int num_rows = 1100;  // two steps of the scan
    const int width = 5;
    const int stride = 9;
    const std::vector<int32_t> row = random_ids(random, num_pairs, 0, num_rows);
    std::vector<float> y(num_pairs * width);
    std::vector<float> weight(num_pairs);
    for (float& value : y)
        value = static_cast<float>(static_cast<int>(random() % 17) - 8);
    for (float& value : weight)
        value = 0.5f * static_cast<float>(random() % 8);
    std::vector<float> x(num_rows * width, std::nanf(""));
    std::vector<int32_t> scratch(static_cast<size_t>(scatter_add_rows_scratch(num_pairs, num_rows)), kGuard);
    const int32_t length = 850;
    const std::vector<float> y_apart = set_apart(y, width, stride);
    std::vector<float> expected(x.size(), 0.0f);
    for (int n = 0; n < length; ++n)
        for (int d = 0; d < width; ++d)
            expected[row[n] * width + d] += weight[n] * y[n * width + d];
    launch_scatter_add_rows({.y = y_apart.data(),
                             .y_stride = stride,
                             .row = row.data(),
                             .weight = weight.data(),
                             .length = &length,
                             .x = x.data(),
                             .num_pairs = num_pairs,
                             .num_rows = num_rows,
                             .width = width},
                            Element::kFloat, scratch.data(), nullptr);
    expect_equal(x, expected, "x");
}

// The order of a row's sum is that of the list: 1 + 1 + 2^24 depends on it.
void scatter_add_rows_in_order(Random&) {
    constexpr int kNumRows = 40;
    std::vector<int32_t> row;
    std::vector<float> y;
    for (const float value : {1.0f, 1.0f, 0x1p24f})
        for (int t = 0; t < kNumRows; ++t) {
            row.push_back(t);
            y.push_back(value);
        }
    std::vector<float> x(kNumRows, std::nanf(""));
    std::vector<int32_t> scratch(static_cast<size_t>(scatter_add_rows_scratch(3 * kNumRows, kNumRows)), kGuard);
    launch_scatter_add_rows({.y = y.data(),
                             .y_stride = 1,
                             .row = row.data(),
                             .weight = nullptr,
                             .length = nullptr,
                             .x = x.data(),
                             .num_pairs = 3 * kNumRows,
                             .num_rows = kNumRows,
                             .width = 1},
                            Element::kFloat, scratch.data(), nullptr);
    expect_equal(x, std::vector<float>(kNumRows, 0x1p24f + 2), "x");
}

void grouped_gemm(Random& random) {
    const std::vector<int32_t> offset{0, 0, 70, 71, 90};
    const std::vector<int32_t> slot{1, 3, 0, 2};
    const int num_rows = offset.back();
    const int cols = 70;
    const int inner = 19;
    const int a_stride = inner + 4;
    const std::vector<int32_t> row = random_ids(random, num_rows, 0, 40);
    const std::vector<float> a = random_floats(random, 40 * inner);
    const std::vector<float> a_apart = set_apart(a, inner, a_stride);
    const std::vector<float> b = random_floats(random, 4 * cols * inner);
    for (const bool b_is_kn : {false, true}) {
        const int b_width = b_is_kn ? cols : inner;
        const int b_stride = b_width + 3;
        const int b_slot_stride = (b_is_kn ? inner : cols) * b_stride + 7;
        const std::vector<float> b_rows = set_apart(b, b_width, b_stride);
        const std::vector<float> b_apart = set_apart(b_rows, b_slot_stride - 7, b_slot_stride);
        std::vector<float> c(static_cast<size_t>((num_rows + 5) * cols), std::nanf(""));
        launch_grouped_gemm({.a = a_apart.data(),
                             .b = b_apart.data(),
                             .c = c.data(),
                             .offset = offset.data(),
                             .slot = slot.data(),
                             .row = row.data(),
                             .a_stride = a_stride,
                             .b_slot_stride = b_slot_stride,
                             .b_row_stride = b_stride,
                             .num_groups = 4,
                             .capacity = num_rows + 5,
                             .inner = inner,
                             .cols = cols,
                             .b_is_kn = b_is_kn},
                            Element::kFloat, nullptr);
        for (int group = 0; group < 4; ++group)
            for (int m = offset[group]; m < offset[group + 1]; ++m)
                for (int n = 0; n < cols; ++n) {
                    double sum = 0;
                    for (int k = 0; k < inner; ++k)
                        sum += static_cast<double>(a[row[m] * inner + k]) *
                               b[slot[group] * cols * inner + (b_is_kn ? k * cols + n : n * inner + k)];
                    expect_near(c[m * cols + n], sum, 1e-5, "c[" + std::to_string(m) + "][" + std::to_string(n) + "]");
                }
        expect(std::isnan(c[num_rows * cols]), "a row beyond the last offset was written");
    }
}

void grouped_gemm_varlen_k(Random& random) {
    const std::vector<int32_t> offset{0, 50, 50, 51};
    const std::vector<int32_t> slot{2, 1, 2};
    const int a_width = 66;
    const int b_width = 9;
    const int out_stride = b_width + 2;
    const int out_slot_stride = a_width * out_stride + 5;
    const std::vector<int32_t> row_b = random_ids(random, 51, 0, 20);
    const std::vector<float> a = random_floats(random, 51 * a_width);
    const std::vector<float> b = random_floats(random, 20 * b_width);
    const std::vector<float> a_apart = set_apart(a, a_width, a_width + 3);
    const std::vector<float> b_apart = set_apart(b, b_width, b_width + 4);
    const std::vector<float> before = random_floats(random, 3 * out_slot_stride);
    for (const bool accumulate : {false, true}) {
        std::vector<float> out = before;
        launch_grouped_gemm_varlen_k({.a = a_apart.data(),
                                      .b = b_apart.data(),
                                      .out = out.data(),
                                      .offset = offset.data(),
                                      .slot = slot.data(),
                                      .row_a = nullptr,
                                      .row_b = row_b.data(),
                                      .a_stride = a_width + 3,
                                      .b_stride = b_width + 4,
                                      .out_slot_stride = out_slot_stride,
                                      .out_row_stride = out_stride,
                                      .num_groups = 3,
                                      .num_slots = 3,
                                      .a_width = a_width,
                                      .b_width = b_width,
                                      .out_is_wide = false,
                                      .accumulate = accumulate},
                                     Element::kFloat, nullptr);
        std::vector<float> beside = out;  // what lies between rows and slots stays as it was
        for (int s = 0; s < 3; ++s)
            for (int i = 0; i < a_width; ++i)
                for (int j = 0; j < b_width; ++j) {
                    const int at = s * out_slot_stride + i * out_stride + j;
                    beside[at] = before[at];
                    double sum = accumulate ? before[at] : 0;
                    for (int k = 0; k < (s == 2 ? 51 : 0); ++k)
                        sum += static_cast<double>(a[k * a_width + i]) * b[row_b[k] * b_width + j];
                    expect_near(out[at], sum, 1e-5, "out[" + std::to_string(at) + "]");
                }
        expect_equal(beside, before, "beside out");
    }
}

}  // namespace
}  // namespace moetrain::test

int main() {
    using namespace moetrain::test;
    Runner runner;
    const auto with_seeds = [&runner](const std::string& name, void (*check)(Random&)) {
        for (const uint64_t seed : {1, 2, 3})
            runner.run(name + ", seed " + std::to_string(seed), [&] {
                moetrain::emulation::launch_settings.seed = 100 * seed;
                Random random(seed);
                check(random);
            });
    };
    with_seeds("gather_rows", gather_rows);
    with_seeds("group_pairs", group_pairs);
    with_seeds("scatter_add_rows", scatter_add_rows);
    with_seeds("scatter_add_rows in order", scatter_add_rows_in_order);
    with_seeds("grouped_gemm", grouped_gemm);
    with_seeds("grouped_gemm_varlen_k", grouped_gemm_varlen_k);
    return runner.exit_code();
}
