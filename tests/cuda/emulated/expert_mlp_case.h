// The up-projection and the gradient of the hidden rows, against a float64 reference, over any architecture (`Launch`).
#pragma once

#include <random>
#include <vector>

#include "cuda/expert_mlp/epilogues.h"
#include "gemm_case.h"

namespace moetrain::test {

constexpr double kInvSqrt2 = 0.70710678118654752;
constexpr double kInvSqrt2Pi = 0.39894228040143268;
constexpr double kFastMath = 0x1p-19;  // of the device's exp, erfc and divide, relative

struct Case {
    std::vector<int> group_sizes;
    int width;   // D
    int hidden;  // F
    experts::UngatedActivation activation = experts::UngatedActivation::kGelu;
    int num_blocks = 2;
    bool has_bias = false;
    bool stores_h = true;
    bool stores_a = true;
};

struct Activated {
    double value;
    double slope;  // of value by the first argument
    double second_slope;
};

inline Activated reference_activation(bool is_gated, experts::UngatedActivation activation, double x, double up) {
    if (is_gated) {
        const double s = 1 / (1 + std::exp(-x));
        return {x * s * up, up * (s + x * s * (1 - s)), x * s};
    }
    if (activation == experts::UngatedActivation::kRelu2) return {x > 0 ? x * x : 0, x > 0 ? 2 * x : 0, 0};
    const double cdf = 0.5 * std::erfc(-x * kInvSqrt2);
    return {x * cdf, cdf + x * kInvSqrt2Pi * std::exp(-x * x / 2), 0};
}

// What both kernels have: T rows gathered for N pairs in groups, a weight each.
struct Pairs {
    std::mt19937_64 random;
    std::vector<int32_t> offsets;
    int num_groups;
    int num_pairs;
    int num_tokens;
    int num_slots;
    std::vector<int32_t> slots;
    std::vector<int32_t> row_indices;
    FloatBuffer weight;

    Pairs(const Case& test, uint64_t seed)
        : random(seed),
          offsets(offsets_of(test.group_sizes)),
          num_groups(static_cast<int>(test.group_sizes.size())),
          num_pairs(offsets.back()),
          num_tokens(num_pairs / 2 + 3),
          num_slots(num_groups + 1),
          weight(static_cast<size_t>(num_pairs)) {
        weight.fill_random(random, 1.0f);
        for (int group_idx = 0; group_idx < num_groups; ++group_idx)
            slots.push_back(num_groups - group_idx);
        for (int pair = 0; pair < num_pairs; ++pair)
            row_indices.push_back(static_cast<int32_t>(random() % num_tokens));
    }

    template <class Body>
    void for_each_value(int num_columns, const Body& body) const {
        for (int group_idx = 0; group_idx < num_groups; ++group_idx)
            for (int pair = offsets[group_idx]; pair < offsets[group_idx + 1]; ++pair)
                for (int column = 0; column < num_columns; ++column)
                    body(pair, slots[group_idx], column);
    }

    template <class Launch, class Epilogue>
    void run(const Case& test, const gemm::GroupedGemmProblem& given, const Epilogue& epilogue,
             const std::vector<emulation::GlobalRange>& tensors, Timing timing, uint64_t seed) const {
        gemm::GroupedGemmProblem problem = given;
        problem.row_indices = row_indices.data();
        problem.group_offsets = offsets.data();
        problem.slots = slots.data();
        problem.num_a_rows = num_tokens;
        problem.num_groups = num_groups;
        problem.num_slots = num_slots;
        Launch::run_gemm(problem, epilogue, grid_of(test.num_blocks, timing, seed, tensors));
    }
};

// H = X[row] · W_inᵀ + b_in and A = weight * act(H).
template <class Launch, bool kGated>
void check_up(const Case& test, Timing timing, uint64_t seed) {
    constexpr int kParts = kGated ? 2 : 1;
    Pairs pairs(test, seed);
    const int columns = kParts * test.hidden;
    const int h_stride = columns + 16;
    const int bias_stride = columns + 8;
    Bf16Buffer x(static_cast<size_t>(pairs.num_tokens) * test.width);
    Bf16Buffer w(static_cast<size_t>(pairs.num_slots) * columns * test.width);
    Bf16Buffer bias(static_cast<size_t>(pairs.num_slots) * bias_stride);
    Bf16Buffer h(static_cast<size_t>(pairs.num_pairs) * h_stride, 128 * h_stride);
    Bf16Buffer a(static_cast<size_t>(pairs.num_pairs) * test.hidden, 128 * test.hidden);
    x.fill_random(pairs.random, 1.0f);
    w.fill_random(pairs.random, 3.0f / std::sqrt(static_cast<float>(test.width)));
    bias.fill_random(pairs.random, 1.0f);

    const experts::UpEpilogue<kGated> epilogue{.h = test.stores_h ? h.data() : nullptr,
                                               .a = test.stores_a ? a.data() : nullptr,
                                               .h_stride = h_stride,
                                               .hidden = test.hidden,
                                               .weight = pairs.weight.data(),
                                               .bias = test.has_bias ? bias.data() : nullptr,
                                               .bias_stride = bias_stride,
                                               .activation = test.activation};
    const gemm::GroupedGemmProblem problem{.a = x.data(), .b = w.data(), .num_columns = columns, .depth = test.width};
    pairs.run<Launch>(test, problem, epilogue, {x.range(), w.range()}, timing, seed);

    h.expect_untouched_from(test.stores_h ? h.size() : 0, "h");
    a.expect_untouched_from(test.stores_a ? a.size() : 0, "a");
    const auto pre_activation = [&](int pair, int slot, int column) {
        Sum sum;
        const Bf16* row = x.data() + static_cast<size_t>(pairs.row_indices[pair]) * test.width;
        for (int d = 0; d < test.width; ++d)
            sum.add(to_double(row[d]), to_double(w[(static_cast<size_t>(slot) * columns + column) * test.width + d]));
        if (test.has_bias) sum.add(to_double(bias[slot * bias_stride + column]), 1);
        return sum;
    };
    pairs.for_each_value(test.hidden, [&](int pair, int slot, int column) {
        Sum parts[2];
        for (int part = 0; part < kParts; ++part) {
            parts[part] = pre_activation(pair, slot, part * test.hidden + column);
            if (test.stores_h)
                expect_near(to_double(h[pair * h_stride + part * test.hidden + column]), parts[part].value,
                            parts[part].fp32_error(), true, at(part == 0 ? "h, gate" : "h, up", pair, column));
        }
        if (!test.stores_a) return;
        const Activated activated = reference_activation(kGated, test.activation, parts[0].value, parts[1].value);
        const double error = std::abs(activated.slope) * parts[0].fp32_error() +
                             std::abs(activated.second_slope) * parts[1].fp32_error() +
                             std::abs(activated.value) * kFastMath + 1e-7;
        expect_near(to_double(a[pair * test.hidden + column]), pairs.weight[pair] * activated.value,
                    std::abs(pairs.weight[pair]) * error, true, at("a", pair, column));
    });
}

// dA' = dY[row] · W_out; dH, weight * A and the parts of <dA', A>, from H.
template <class Launch, bool kGated, bool kInPlace = false>
void check_hidden_grad(const Case& test, Timing timing, uint64_t seed) {
    constexpr int kParts = kGated ? 2 : 1;
    Pairs pairs(test, seed);
    const int columns = kParts * test.hidden;
    const int h_stride = columns + 8;
    const int num_parts = Launch::num_weight_grad_parts(test.hidden);
    Bf16Buffer dy(static_cast<size_t>(pairs.num_tokens) * test.width);
    Bf16Buffer w(static_cast<size_t>(pairs.num_slots) * test.width * test.hidden);
    Bf16Buffer h(static_cast<size_t>(pairs.num_pairs) * h_stride);
    Bf16Buffer h_before(h.size());
    Bf16Buffer dh(static_cast<size_t>(pairs.num_pairs) * columns, 128 * columns);
    Bf16Buffer a(static_cast<size_t>(pairs.num_pairs) * test.hidden, 128 * test.hidden);
    FloatBuffer weight_grad(static_cast<size_t>(num_parts) * pairs.num_pairs, 128);
    dy.fill_random(pairs.random, 1.0f);
    w.fill_random(pairs.random, 3.0f / std::sqrt(static_cast<float>(test.width)));
    h.fill_random(pairs.random, 4.0f);
    std::memcpy(h_before.data(), h.data(), h.size() * sizeof(Bf16));

    const int dh_stride = kInPlace ? h_stride : columns;
    Bf16* dh_data = kInPlace ? h.data() : dh.data();
    const experts::HiddenGradEpilogue<kGated> epilogue{.h = h.data(),
                                                       .h_stride = h_stride,
                                                       .dh = dh_data,
                                                       .dh_stride = dh_stride,
                                                       .a = a.data(),
                                                       .hidden = test.hidden,
                                                       .weight = pairs.weight.data(),
                                                       .weight_grad = weight_grad.data(),
                                                       .num_pairs = pairs.num_pairs,
                                                       .activation = test.activation};
    const gemm::GroupedGemmProblem problem{
        .a = dy.data(), .b = w.data(), .num_columns = test.hidden, .depth = test.width};
    pairs.run<Launch>(test, problem, epilogue, {dy.range(), w.range()}, timing, seed);

    dh.expect_untouched_from(kInPlace ? 0 : dh.size(), "dh");
    a.expect_untouched_from(a.size(), "a");
    weight_grad.expect_untouched_from(weight_grad.size(), "weight_grad");
    std::vector<Sum> product(pairs.num_pairs);
    std::vector<double> product_error(pairs.num_pairs);
    pairs.for_each_value(test.hidden, [&](int pair, int slot, int column) {
        Sum da;
        for (int d = 0; d < test.width; ++d)
            da.add(to_double(dy[static_cast<size_t>(pairs.row_indices[pair]) * test.width + d]),
                   to_double(w[(static_cast<size_t>(slot) * test.width + d) * test.hidden + column]));
        const auto h_of = [&](int part) { return to_double(h_before[pair * h_stride + part * test.hidden + column]); };
        const double weight = pairs.weight[pair];
        const Activated activated = reference_activation(kGated, test.activation, h_of(0), kGated ? h_of(1) : 0);
        const auto expect_grad = [&](double actual, double slope, const std::string& what) {
            const double error = std::abs(weight) * (std::abs(slope) * da.fp32_error() +
                                                     std::abs(da.value) * (std::abs(slope) + 1) * kFastMath);
            expect_near(actual, weight * da.value * slope, error, true, at(what, pair, column));
        };
        expect_grad(to_double(dh_data[pair * dh_stride + column]), activated.slope, "dh, gate");
        if (kGated)
            expect_grad(to_double(dh_data[pair * dh_stride + test.hidden + column]), activated.second_slope, "dh, up");
        expect_near(to_double(a[pair * test.hidden + column]), weight * activated.value,
                    std::abs(activated.value) * kFastMath + 1e-7, true, at("a", pair, column));
        product[pair].add(da.value, activated.value);
        product_error[pair] += da.fp32_error() * std::abs(activated.value) +
                               std::abs(da.value) * (std::abs(activated.value) * kFastMath + 1e-7);
    });
    for (int pair = 0; pair < pairs.num_pairs; ++pair) {
        double sum = 0;
        for (int part = 0; part < num_parts; ++part)
            sum += weight_grad[part * pairs.num_pairs + pair];
        expect_near(sum, product[pair].value, product[pair].fp32_error() + product_error[pair], false,
                    at("weight_grad", pair, 0));
    }
}

}  // namespace moetrain::test
