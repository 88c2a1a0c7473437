// Token-choice selection, as it stands in its .cu file, against a plain reference in float64.
//
// Kernel: routing/select_experts.cu
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "cuda/routing/select_experts.h"
#include "cuda_runtime.h"
#include "expect.h"
#include "vectors.h"

namespace moetrain::test {
namespace {

struct Selection {
    std::vector<int32_t> expert_id;
    std::vector<double> weight;
    std::vector<double> prob_sum;  // [segments, experts], as is count
    std::vector<int64_t> count;
};

// Sets `key`, of scores plus bias, to minus infinity outside the groups_kept groups that are best by the rule: by their
// two largest keys' sum, or by their largest key.
void keep_best_groups(const SelectOptions& o, std::vector<double>& key) {
    const auto size = static_cast<size_t>(o.group_size());
    std::vector<std::pair<double, size_t>> groups;  // (minus what it is judged by, group): ascending is best first
    for (size_t g = 0; g < static_cast<size_t>(o.num_groups); ++g) {
        std::vector<double> keys(key.begin() + g * size, key.begin() + (g + 1) * size);
        std::sort(keys.rbegin(), keys.rend());
        groups.emplace_back(-(o.group_rule == GroupRule::kTop2Sum ? keys[0] + keys[1] : keys[0]), g);
    }
    std::sort(groups.begin(), groups.end());
    for (auto at = groups.begin() + o.groups_kept; at != groups.end(); ++at)
        std::fill_n(key.begin() + at->second * size, size, -std::numeric_limits<double>::infinity());
}

double plain_score(Score score, double logit) {
    if (score == Score::kSoftmax) return std::exp(logit);
    return score == Score::kSigmoid ? 1 / (1 + std::exp(-logit)) : std::sqrt(std::log1p(std::exp(logit)));
}

// No null experts. Logits are such that scores are ordinary numbers in float64.
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
        for (size_t e = 0; e < num_experts; ++e)
            score[e] = plain_score(o.score, logits[t * num_experts + e]);
        const double total = std::accumulate(score.begin(), score.end(), 0.0);
        if (o.score == Score::kSoftmax)
            for (double& s : score)
                s /= total;
        for (size_t e = 0; e < num_experts; ++e)
            result.prob_sum[segment[t] * num_experts + e] += o.score == Score::kSoftmax ? score[e] : score[e] / total;
        std::vector<double> key(num_experts);
        std::transform(score.begin(), score.end(), bias.begin(), key.begin(), std::plus<>());
        keep_best_groups(o, key);
        std::vector<int32_t> order(num_experts);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int32_t i, int32_t j) {
            return key[i] > key[j];  // equal scores: the lower id first
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

SelectOptions options_of(Score score, bool renormalise) {
    SelectOptions o;
    o.num_tokens = 21;
    o.num_experts = 70;
    o.top_k = 3;
    o.num_segments = 16;  // so that sums take five tokens at a time
    o.scale = 2.5;
    o.score = score;
    o.renormalise = renormalise;
    return o;
}

// `depth` lowers every second and third token's logits, once and twice.
void check_select_experts(Random& random, const SelectOptions& o, bool with_bias, float depth = 0) {
    const auto num_tokens = static_cast<size_t>(o.num_tokens);
    std::vector<float> logits = random_floats(random, o.num_tokens * o.num_experts);
    logits[5] = logits[9] = logits[69] = 7;  // a tie: 5, 9 and 69 in this order
    for (size_t i = 0; i < logits.size(); ++i)
        logits[i] -= depth * static_cast<float>(i / static_cast<size_t>(o.num_experts) % 3);
    const std::vector<float> apart = set_apart(logits, o.num_experts, o.num_experts + 3);
    std::vector<float> bias = random_floats(random, o.num_experts);
    if (!with_bias) std::fill(bias.begin(), bias.end(), 0.0f);
    bool valid[21];
    for (size_t t = 0; t < num_tokens; ++t)
        valid[t] = t % 5 != 4;

    std::vector<int32_t> segment = random_ids(random, o.num_tokens, 0, 4);
    segment[4] = 16;  // of a token that is not valid
    segment[7] = 16;  // the first breach
    segment[12] = -1;
    std::vector<int32_t> expert_id(num_tokens * 3, kGuard);
    std::vector<float> weight(expert_id.size(), std::nanf(""));
    std::vector<float> prob_sum(static_cast<size_t>(o.num_segments * o.num_experts), std::nanf(""));
    std::vector<int64_t> count(prob_sum.size(), 0);
    std::vector<float> row_stats(2 * num_tokens, std::nanf(""));
    std::vector<int32_t> row_owner(num_tokens, kGuard);
    std::vector<double> partial(static_cast<size_t>(select_experts_partial_size(o)), std::nan(""));
    int32_t bad = 0;
    int64_t breach = kNoBreach;
    const SelectForwardCuda<float> io{.logits_TE = apart.data(),
                                      .dtype = Element::kFloat,
                                      .row_stride = o.num_experts + 3,
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
    expect(breach == 7, "the first token without a segment is 7, not " + std::to_string(breach));
}

void select_experts(Random& random) {
    check_select_experts(random, options_of(Score::kSoftmax, /*renormalise=*/true), /*with_bias=*/false);
    check_select_experts(random, options_of(Score::kSoftmax, /*renormalise=*/false), /*with_bias=*/true);
    check_select_experts(random, options_of(Score::kSigmoid, /*renormalise=*/true), /*with_bias=*/true);
}

// Scores of 1e-22 and 1e-44, which float32 hardly or not at all knows: shares of them are what they always are.
void select_experts_of_deep_logits(Random& random) {
    for (const Score score : {Score::kSoftmax, Score::kSigmoid, Score::kSqrtSoftplus})
        for (const bool with_bias : {false, true}) {
            SelectOptions o = options_of(score, /*renormalise=*/true);
            check_select_experts(random, o, with_bias, /*depth=*/50);
            o.num_groups = 7;
            o.groups_kept = 2;
            check_select_experts(random, o, with_bias, /*depth=*/50);
        }
}

void select_experts_of_groups(Random& random) {
    for (const GroupRule rule : {GroupRule::kTop2Sum, GroupRule::kMax})
        for (const bool with_bias : {false, true}) {
            SelectOptions o = options_of(with_bias ? Score::kSigmoid : Score::kSoftmax, /*renormalise=*/true);
            o.num_groups = 7;
            o.groups_kept = 2;
            o.group_rule = rule;
            check_select_experts(random, o, with_bias);
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
    with_seeds("select_experts", select_experts);
    with_seeds("select_experts of groups", select_experts_of_groups);
    with_seeds("select_experts of deep logits", select_experts_of_deep_logits);
    return runner.exit_code();
}
