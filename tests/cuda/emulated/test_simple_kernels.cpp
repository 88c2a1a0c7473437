// The simple kernels, as they stand in their .cu files, against plain references.
//
// Kernel: gather_rows.cu
// Kernel: group_pairs.cu
// Kernel: grouped_gemm.cu
// Kernel: grouped_gemm_varlen_k.cu
// Kernel: scatter_add_rows.cu
// Kernel: select_experts.cu
#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "expect.h"
#include "gather_rows.h"
#include "group_pairs.h"
#include "grouped_gemm.h"
#include "grouped_gemm_varlen_k.h"
#include "scatter_add_rows.h"
#include "select_experts.h"
#include "tensors.h"

namespace moetrain::test {
namespace {

using Random = std::mt19937_64;

constexpr int32_t kGuard = -77;

std::vector<int32_t> random_ids(Random& random, int64_t size, int32_t low, int32_t high) {
    std::uniform_int_distribution<int32_t> uniform(low, high - 1);
    std::vector<int32_t> ids(static_cast<size_t>(size));
    for (int32_t& id : ids)
        id = uniform(random);
    return ids;
}

std::vector<float> random_floats(Random& random, int64_t size) {
    std::uniform_real_distribution<float> uniform(-1, 1);
    std::vector<float> values(static_cast<size_t>(size));
    for (float& value : values)
        value = uniform(random);
    return values;
}

template <class T>
void expect_equal(const std::vector<T>& actual, const std::vector<T>& expected, const std::string& what) {
    for (size_t i = 0; i < expected.size(); ++i)
        expect(actual[i] == expected[i], what + "[" + std::to_string(i) + "]: expected " + std::to_string(expected[i]) +
                                             ", got " + std::to_string(actual[i]));
}

void expect_near(double actual, double expected, double tolerance, const std::string& what) {
    if (std::abs(actual - expected) <= tolerance) return;  // false for NaN
    std::ostringstream message;
    message << what << ": expected " << expected << " within " << tolerance << ", got " << actual;
    throw std::runtime_error(message.str());
}

// Rows of 6, 12 and 32 bytes: every width of load. The list ends before its capacity.
void gather_rows(Random& random) {
    for (const int width : {3, 6, 16}) {
        const int num_rows = 37;
        const std::vector<int32_t> row = random_ids(random, num_rows, 0, 9);
        std::vector<int16_t> x(static_cast<size_t>(9 * width));
        std::iota(x.begin(), x.end(), int16_t{1});
        std::vector<int16_t> y(static_cast<size_t>(num_rows * width), kGuard);
        const int32_t length = 33;
        std::vector<int16_t> expected = y;
        for (int i = 0; i < length; ++i)
            std::copy_n(x.begin() + row[i] * width, width, expected.begin() + i * width);
        const auto status =
            launch_gather_rows(x.data(), 2 * width, row.data(), &length, y.data(), num_rows, 2 * width, nullptr);
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
    const int num_pairs = 700;
    const int num_rows = 1100;  // two steps of the scan
    const int width = 5;
    const std::vector<int32_t> row = random_ids(random, num_pairs, 0, num_rows);
    std::vector<float> y(num_pairs * width);
    std::vector<float> weight(num_pairs);
    for (float& value : y)
        value = static_cast<float>(static_cast<int>(random() % 17) - 8);
    for (float& value : weight)
        value = 0.5f * static_cast<float>(random() % 8);
    std::vector<float> x(num_rows * width, std::nanf(""));
    std::vector<int32_t> scratch(static_cast<size_t>(scatter_add_rows_scratch(num_pairs, num_rows)), kGuard);
    const int32_t length = 650;
    std::vector<float> expected(x.size(), 0.0f);
    for (int n = 0; n < length; ++n)
        for (int d = 0; d < width; ++d)
            expected[row[n] * width + d] += weight[n] * y[n * width + d];
    launch_scatter_add_rows({.y = y.data(),
                             .y_stride = width,
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
    const std::vector<int32_t> row = random_ids(random, num_rows, 0, 40);
    const std::vector<float> a = random_floats(random, 40 * inner);
    const std::vector<float> b = random_floats(random, 4 * cols * inner);
    for (const bool b_is_kn : {false, true}) {
        std::vector<float> c(static_cast<size_t>((num_rows + 5) * cols), std::nanf(""));
        launch_grouped_gemm({.a = a.data(),
                             .b = b.data(),
                             .c = c.data(),
                             .offset = offset.data(),
                             .slot = slot.data(),
                             .row = row.data(),
                             .a_stride = inner,
                             .b_slot_stride = cols * inner,
                             .b_row_stride = b_is_kn ? cols : inner,
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
    const std::vector<int32_t> row_b = random_ids(random, 51, 0, 20);
    const std::vector<float> a = random_floats(random, 51 * a_width);
    const std::vector<float> b = random_floats(random, 20 * b_width);
    const std::vector<float> before = random_floats(random, 3 * a_width * b_width);
    for (const bool accumulate : {false, true}) {
        std::vector<float> out = before;
        launch_grouped_gemm_varlen_k({.a = a.data(),
                                      .b = b.data(),
                                      .out = out.data(),
                                      .offset = offset.data(),
                                      .slot = slot.data(),
                                      .row_a = nullptr,
                                      .row_b = row_b.data(),
                                      .a_stride = a_width,
                                      .b_stride = b_width,
                                      .out_slot_stride = a_width * b_width,
                                      .out_row_stride = b_width,
                                      .num_groups = 3,
                                      .num_slots = 3,
                                      .a_width = a_width,
                                      .b_width = b_width,
                                      .out_is_wide = false,
                                      .accumulate = accumulate},
                                     Element::kFloat, nullptr);
        for (int s = 0; s < 3; ++s)
            for (int i = 0; i < a_width; ++i)
                for (int j = 0; j < b_width; ++j) {
                    const int at = (s * a_width + i) * b_width + j;
                    double sum = accumulate ? before[at] : 0;
                    for (int k = 0; k < (s == 2 ? 51 : 0); ++k)
                        sum += static_cast<double>(a[k * a_width + i]) * b[row_b[k] * b_width + j];
                    expect_near(out[at], sum, 1e-5, "out[" + std::to_string(at) + "]");
                }
    }
}

struct Selection {
    std::vector<int32_t> expert_id;
    std::vector<double> weight;
    std::vector<double> prob_sum;  // [segments, experts], as is count
    std::vector<int64_t> count;
};

// Softmax or sigmoid scores; no groups of experts, no null experts.
Selection select_plainly(const SelectOptions& o, const std::vector<float>& logits, const std::vector<float>& bias,
                         const bool* valid, const std::vector<int32_t>& segment) {
    const auto num_experts = static_cast<size_t>(o.num_experts);
    const auto top_k = static_cast<size_t>(o.top_k);
    const size_t size = num_experts * static_cast<size_t>(o.num_segments);
    Selection result{{}, {}, std::vector<double>(size, 0.0), std::vector<int64_t>(size, 0)};
    for (int64_t t = 0; t < o.num_tokens; ++t) {
        if (!valid[t] || segment[t] < 0 || segment[t] >= o.num_segments) {
            result.expert_id.insert(result.expert_id.end(), top_k, -1);
            result.weight.insert(result.weight.end(), top_k, 0.0);
            continue;
        }
        std::vector<double> score(num_experts);
        for (size_t e = 0; e < num_experts; ++e) {
            const double logit = logits[t * num_experts + e];
            score[e] = o.score == Score::kSigmoid ? 1 / (1 + std::exp(-logit)) : std::exp(logit);
        }
        const double total = std::accumulate(score.begin(), score.end(), 0.0);
        if (o.score == Score::kSoftmax)
            for (double& s : score)
                s /= total;
        for (size_t e = 0; e < num_experts; ++e)
            result.prob_sum[segment[t] * num_experts + e] += o.score == Score::kSoftmax ? score[e] : score[e] / total;
        std::vector<int32_t> order(num_experts);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int32_t i, int32_t j) {
            return score[i] + bias[i] > score[j] + bias[j];  // equal scores: the lower id first
        });
        double sum = 0;
        for (size_t k = 0; k < top_k; ++k)
            sum += score[order[k]];
        for (size_t k = 0; k < top_k; ++k) {
            result.expert_id.push_back(order[k]);
            result.weight.push_back(o.scale * score[order[k]] / (o.renormalise ? sum : 1));
            ++result.count[segment[t] * num_experts + order[k]];
        }
    }
    return result;
}

void check_select_experts(Random& random, Score score, bool with_bias, bool renormalise) {
    SelectOptions o;
    o.num_tokens = 21;
    o.num_experts = 70;
    o.top_k = 3;
    o.num_segments = 16;  // so that sums take five tokens at a time
    o.scale = 2.5;
    o.score = score;
    o.renormalise = renormalise;
    const auto num_tokens = static_cast<size_t>(o.num_tokens);
    std::vector<float> logits = random_floats(random, o.num_tokens * o.num_experts);
    logits[5] = logits[9] = logits[69] = 7;  // a tie: 5, 9 and 69 in this order
    std::vector<float> bias = random_floats(random, o.num_experts);
    if (!with_bias) std::fill(bias.begin(), bias.end(), 0.0f);
    bool valid[21];
    for (size_t t = 0; t < num_tokens; ++t)
        valid[t] = t % 5 != 4;

    std::vector<int32_t> segment = random_ids(random, o.num_tokens, 0, 4);
    segment[7] = 16;
    std::vector<int32_t> expert_id(num_tokens * 3, kGuard);
    std::vector<float> weight(expert_id.size(), std::nanf(""));
    std::vector<float> prob_sum(static_cast<size_t>(o.num_segments * o.num_experts), std::nanf(""));
    std::vector<int64_t> count(prob_sum.size(), 0);
    std::vector<float> row_stats(2 * num_tokens, std::nanf(""));
    std::vector<int32_t> row_owner(num_tokens, kGuard);
    std::vector<double> partial(static_cast<size_t>(select_experts_partial_size(o)), std::nan(""));
    int32_t bad = 0;
    int64_t breach = kNoBreach;
    const SelectForwardCuda<float> io{.logits_TE = logits.data(),
                                      .dtype = Element::kFloat,
                                      .row_stride = o.num_experts,
                                      .bias_E = with_bias ? bias.data() : nullptr,
                                      .valid_T = valid,
                                      .segment_T = segment.data(),
                                      .expert_id_TK = expert_id.data(),
                                      .weight_TK = weight.data(),
                                      .prob_sum_GE = prob_sum.data(),
                                      .count_GE = count.data(),
                                      .bad_1 = &bad,
                                      .row_stats_T2 = row_stats.data(),
                                      .row_owner_T = row_owner.data(),
                                      .partial = partial.data(),
                                      .breach = &breach};
    expect(launch_select_experts(o, io, nullptr) == cudaSuccess, "launch_select_experts failed");
    const Selection expected = select_plainly(o, logits, bias, valid, segment);
    expect_equal(expert_id, expected.expert_id, "expert_id");
    expect_equal(count, expected.count, "count");
    for (size_t i = 0; i < weight.size(); ++i)
        expect_near(weight[i], expected.weight[i], 1e-5, "weight[" + std::to_string(i) + "]");
    for (size_t e = 0; e < prob_sum.size(); ++e)
        expect_near(prob_sum[e], expected.prob_sum[e], 1e-5, "prob_sum[" + std::to_string(e) + "]");
    expect(bad == 0, "Inf or NaN was reported where there is none");
    expect(breach == 7, "the token without a segment is 7, not " + std::to_string(breach));
}

void select_experts(Random& random) {
    check_select_experts(random, Score::kSoftmax, /*with_bias=*/false, /*renormalise=*/true);
    check_select_experts(random, Score::kSoftmax, /*with_bias=*/true, /*renormalise=*/false);
    check_select_experts(random, Score::kSigmoid, /*with_bias=*/true, /*renormalise=*/true);
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
    with_seeds("select_experts", select_experts);
    return runner.exit_code();
}
