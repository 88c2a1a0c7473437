// What route adds to select_experts: choices grouped by expert, and the gradient that is read through that grouping.
//
// Kernel: routing/group_pairs.cu
// Kernel: routing/select_experts.cu
// Kernel: routing/select_experts_backward.cu
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda/routing/group_pairs.h"
#include "cuda/routing/select_experts.h"
#include "cuda_runtime.h"
#include "expect.h"
#include "vectors.h"

namespace moetrain::test {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// Choices of tokens among experts, each token's distinct; -1 where it has none.
std::vector<int32_t> random_choices(Random& random, int64_t num_tokens, int32_t num_experts, int64_t top_k) {
    std::vector<int32_t> id;
    std::vector<int32_t> all(static_cast<size_t>(num_experts));
    std::iota(all.begin(), all.end(), 0);
    for (int64_t t = 0; t < num_tokens; ++t) {
        std::shuffle(all.begin(), all.end(), random);
        for (int64_t k = 0; k < top_k; ++k)
            id.push_back(random() % 7 == 0 ? -1 : all[k]);
    }
    return id;
}

// The n of each choice p in the stable order of (expert, p), choices of no expert last.
std::vector<int32_t> places_of(const std::vector<int32_t>& id, int32_t num_experts) {
    std::vector<int32_t> order(id.size()), place(id.size());
    std::iota(order.begin(), order.end(), 0);
    const auto bucket = [&](int32_t p) { return id[p] < 0 ? num_experts : id[p]; };
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return bucket(a) < bucket(b); });
    for (size_t n = 0; n < order.size(); ++n)
        place[order[n]] = static_cast<int32_t>(n);
    return place;
}

template <class Acc>
void group_choices(Random& random) {
    struct Sizes {
        int64_t num_tokens;
        int32_t num_experts;
        int32_t top_k;
    };
    for (const auto& [num_tokens, num_experts, top_k] : {Sizes{500, 37, 5}, {1, 3, 3}, {300, 4, 1}, {0, 5, 2}}) {
        const std::vector<int32_t> id = random_choices(random, num_tokens, num_experts, top_k);
        std::vector<Acc> weight(id.size());
        std::iota(weight.begin(), weight.end(), Acc(1));
        std::vector<int32_t> token(id.size(), kGuard), place(id.size(), kGuard);
        std::vector<Acc> weight_N(id.size(), Acc(kGuard));
        std::vector<int32_t> offset(static_cast<size_t>(num_experts) + 1, kGuard);
        const auto num_pairs = static_cast<int64_t>(id.size());
        std::vector<int32_t> scratch(static_cast<size_t>(group_pairs_scratch_size(num_pairs, num_experts)), kGuard);
        const GroupedChoices<Acc> to{.weight_TK = weight.data(),
                                     .top_k = top_k,
                                     .token_N = token.data(),
                                     .weight_N = weight_N.data(),
                                     .place_TK = place.data()};
        const auto status =
            launch_group_choices(id.data(), num_pairs, num_experts, to, offset.data(), scratch.data(), nullptr);
        expect(status == cudaSuccess, "launch_group_choices failed");

        const std::vector<int32_t> expected = places_of(id, num_experts);
        std::vector<int32_t> expected_token(id.size()), expected_offset(offset.size(), 0);
        std::vector<Acc> expected_weight(id.size());
        for (size_t p = 0; p < id.size(); ++p) {
            expected_token[expected[p]] = static_cast<int32_t>(p) / top_k;
            expected_weight[expected[p]] = weight[p];
            for (int32_t e = id[p] + 1; id[p] >= 0 && e <= num_experts; ++e)
                ++expected_offset[e];
        }
        expect_equal(place, expected, "place");
        expect_equal(token, expected_token, "token");
        expect_equal(weight_N, expected_weight, "weight");
        expect_equal(offset, expected_offset, "offset");
    }
}

struct Pulls {
    std::vector<double> weight;    // [tokens, k]
    std::vector<double> prob_sum;  // [experts]
};

// What the gradient is of: the pulls times one token's weights and probabilities, for choices that stay as they are.
double pulled(const SelectOptions& o, const std::vector<double>& logit, const int32_t* id, const double* dweight,
              const Pulls& pulls) {
    const auto raw = [&](double x) {
        if (o.score == Score::kSigmoid) return 1 / (1 + std::exp(-x));
        return o.score == Score::kSoftmax ? std::exp(x) : std::sqrt(std::log1p(std::exp(x)));
    };
    double total = 0, chosen = 0, sum = 0;
    for (const double x : logit)
        total += raw(x);
    for (int64_t k = 0; k < o.top_k; ++k)
        if (id[k] >= 0 && id[k] < o.num_true()) chosen += raw(logit[id[k]]);
    const double by = o.renormalise ? chosen : o.score == Score::kSoftmax ? total : 1;
    for (int64_t k = 0; k < o.top_k; ++k)
        if (id[k] >= 0 && id[k] < o.num_true()) sum += dweight[k] * o.scale * raw(logit[id[k]]) / by;
    for (size_t e = 0; e < logit.size(); ++e)
        sum += pulls.prob_sum[e] * raw(logit[e]) / total;
    return sum;
}

struct Case {
    SelectOptions options;
    std::vector<double> logits;
    std::vector<int32_t> id;
    Pulls pulls;

    std::vector<double> gradient(const std::vector<double>& dweight, const int32_t* place) const {
        std::vector<double> dlogits(logits.size(), kNan);
        const std::vector<double> apart = set_apart(logits, options.num_experts, options.num_experts + 3);
        const SelectBackwardCuda<double> io{.logits_TE = apart.data(),
                                            .dtype = Element::kDouble,
                                            .row_stride = options.num_experts + 3,
                                            .expert_id_TK = id.data(),
                                            .dweight = dweight.data(),
                                            .place_TK = place,
                                            .dprob_sum_GE = pulls.prob_sum.data(),
                                            .valid_T = nullptr,
                                            .segment_T = nullptr,
                                            .dlogits_TE = dlogits.data()};
        expect(launch_select_experts_backward(options, io, nullptr) == cudaSuccess, "launch failed");
        return dlogits;
    }
};

// Every third token's logits lie 60 lower: its scores are nearly nothing, 1e-26, and so beside 1 without effect.
Case random_case(Random& random, Score score, bool renormalise) {
    Case c;
    c.options.num_tokens = 14;
    c.options.num_experts = 41;
    c.options.top_k = 3;
    c.options.num_null = 2;
    c.options.scale = 1.5;
    c.options.score = score;
    c.options.renormalise = renormalise;
    std::normal_distribution<double> normal;
    const auto fill = [&](std::vector<double>& x, int64_t size) {
        x.resize(static_cast<size_t>(size));
        std::generate(x.begin(), x.end(), [&] { return normal(random); });
    };
    fill(c.logits, c.options.num_tokens * c.options.num_experts);
    for (size_t i = 0; i < c.logits.size(); ++i)
        if (i / static_cast<size_t>(c.options.num_experts) % 3 == 2) c.logits[i] -= 60;
    fill(c.pulls.weight, c.options.num_tokens * c.options.top_k);
    fill(c.pulls.prob_sum, c.options.num_experts);
    c.id = random_choices(random, c.options.num_tokens, static_cast<int32_t>(c.options.num_true()), c.options.top_k);
    return c;
}

void expect_derivative(const Case& c, const std::vector<double>& dlogits) {
    constexpr double kStep = 1e-6;
    const auto num_experts = static_cast<size_t>(c.options.num_experts);
    for (int64_t t = 0; t < c.options.num_tokens; ++t) {
        std::vector<double> logit(c.logits.begin() + t * c.options.num_experts,
                                  c.logits.begin() + (t + 1) * c.options.num_experts);
        const int32_t* id = c.id.data() + t * c.options.top_k;
        const double* dweight = c.pulls.weight.data() + t * c.options.top_k;
        for (size_t e = 0; e < num_experts; ++e) {
            const double at = logit[e];
            logit[e] = at + kStep;
            const double above = pulled(c.options, logit, id, dweight, c.pulls);
            logit[e] = at - kStep;
            const double slope = (above - pulled(c.options, logit, id, dweight, c.pulls)) / (2 * kStep);
            logit[e] = at;
            const size_t i = t * num_experts + e;
            expect(std::abs(dlogits[i] - slope) < 1e-8, "dlogits[" + std::to_string(i) + "]: expected " +
                                                            std::to_string(slope) + ", got " +
                                                            std::to_string(dlogits[i]));
        }
    }
}

// The same gradient whichever order its weights come in, and what lies beyond the list is never read.
void backward(Random& random) {
    for (const Score score : {Score::kSoftmax, Score::kSigmoid, Score::kSqrtSoftplus})
        for (const bool renormalise : {false, true}) {
            const Case c = random_case(random, score, renormalise);
            const std::vector<double> dlogits = c.gradient(c.pulls.weight, nullptr);
            expect_derivative(c, dlogits);
            const std::vector<int32_t> place = places_of(c.id, static_cast<int32_t>(c.options.num_true()));
            std::vector<double> dweight_N(c.id.size(), kNan);
            for (size_t p = 0; p < c.id.size(); ++p)
                if (c.id[p] >= 0) dweight_N[place[p]] = c.pulls.weight[p];
            expect_equal(c.gradient(dweight_N, place.data()), dlogits, "dlogits by place");
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
    with_seeds("choices", group_choices<float>);
    with_seeds("choices weighed in float64", group_choices<double>);
    with_seeds("backward", backward);
    return runner.exit_code();
}
