// What select_experts computes per score, for the host and the device alike. No torch header.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define MOETRAIN_HD __host__ __device__ __forceinline__
#else
#define MOETRAIN_HD inline __attribute__((always_inline))
#endif

namespace moetrain {

enum class Score : int8_t { kSoftmax, kTopkSoftmax, kSigmoid, kSqrtSoftplus };
enum class GroupRule : int8_t { kTop2Sum, kMax };

// Sizes and options of one call; num_experts counts the null experts too, which are the last ids.
struct SelectOptions {
    int64_t num_tokens = 0;
    int64_t num_experts = 0;
    int64_t top_k = 0;
    int64_t num_null = 0;
    int64_t num_groups = 1;
    int64_t groups_kept = 1;
    int64_t num_segments = 1;
    double scale = 1.0;
    Score score = Score::kSoftmax;
    GroupRule group_rule = GroupRule::kTop2Sum;
    bool renormalise = true;

    MOETRAIN_HD bool softmax_over_all() const { return score == Score::kSoftmax || score == Score::kTopkSoftmax; }
    // Renormalised softmax-then-top-k is the softmax over the chosen logits, which cannot divide zero by zero.
    MOETRAIN_HD bool softmax_over_chosen() const {
        return score == Score::kTopkSoftmax || (score == Score::kSoftmax && renormalise);
    }
    // Softmax before top-k, as it is: such weights are probabilities.
    MOETRAIN_HD bool weighs_by_probability() const { return score == Score::kSoftmax && !renormalise; }
    MOETRAIN_HD int64_t num_true() const { return num_experts - num_null; }
    MOETRAIN_HD int64_t group_size() const { return num_experts / num_groups; }
};

// exp(x) for x <= 0. On the host, float is a polynomial (Cephes, error below 2 ulp) that compilers vectorise.
MOETRAIN_HD double exp_nonpositive(double x) { return ::exp(x); }
MOETRAIN_HD float exp_nonpositive(float x) {
#ifdef __CUDA_ARCH__
    return ::expf(x);
#else
    constexpr float kLowest = -87.3F;            // below it the result would be subnormal: zero
    constexpr float kRoundToWhole = 12582912.F;  // 1.5 * 2^23: adding it drops the fraction
    const float clamped = x < kLowest ? kLowest : x;
    const float whole = (clamped * 1.44269504F + kRoundToWhole) - kRoundToWhole;
    const float r = (clamped - whole * 0.693359375F) + whole * 2.12194440e-4F;
    float p = 1.9875691500e-4F;
    p = p * r + 1.3981999507e-3F;
    p = p * r + 8.3334519073e-3F;
    p = p * r + 4.1665795894e-2F;
    p = p * r + 1.6666665459e-1F;
    p = p * r + 5.0000001201e-1F;
    const float mantissa = p * r * r + r + 1.F;
    const float power = std::bit_cast<float>((static_cast<int32_t>(whole) + 127) << 23);
    return x < kLowest ? 0.F : mantissa * power;
#endif
}

// Sigmoid and sqrt(softplus) stand alone: no score depends on another. Shares of them, s / sum of s, are right at any
// logit, since a sum that is nearly nothing is never divided by. Below kDeepLogit the host and the device cannot tell
// 1 + e^x from 1, so that the scores are e^x and e^(x / 2) to the last digit, and their shares a softmax.
template <typename Acc>
constexpr Acc kDeepLogit = sizeof(Acc) == 8 ? Acc(-37) : Acc(-17);

// What the score of a deep logit is the exponential of, per unit of the logit.
template <typename Acc>
MOETRAIN_HD Acc steepness(Score score) {
    return score == Score::kSqrtSoftplus ? Acc(0.5) : Acc(1);
}

// Whether all logits are deep whose scores have this sum. Where not, it is a good divisor: a score that is too small
// for its type is less than 1e-15 of it.
template <typename Acc>
MOETRAIN_HD bool all_deep(Score score, Acc sum) {
    constexpr Acc kLeastScore = sizeof(Acc) == 8 ? Acc(8.533047625744066e-17) : Acc(4.1399377e-8);  // e^kDeepLogit
    constexpr Acc kLeastRoot = sizeof(Acc) == 8 ? Acc(9.237449661970594e-9) : Acc(2.0346837e-4);    // its root
    return sum <= (score == Score::kSqrtSoftplus ? kLeastRoot : kLeastScore);
}

template <typename Acc>
struct LoneScore {
    Acc score;
    Acc log_slope;  // d log(score) / d logit
};

template <typename Acc>
MOETRAIN_HD LoneScore<Acc> lone_sigmoid(Acc x) {
    const Acc decay = exp_nonpositive(x < 0 ? x : -x);
    return {(x < 0 ? decay : Acc(1)) / (Acc(1) + decay), (x < 0 ? Acc(1) : decay) / (Acc(1) + decay)};
}

template <typename Acc>
MOETRAIN_HD LoneScore<Acc> lone_root(Acc x) {
    const Acc root = exp_nonpositive((x < 0 ? x : -x) / 2);
    if (x < kDeepLogit<Acc>) return {root, Acc(0.5)};
    const Acc decay = root * root;
    const Acc softplus = (x > 0 ? x : Acc(0)) + std::log1p(decay);
    return {std::sqrt(softplus), (x < 0 ? decay : Acc(1)) / (Acc(1) + decay) / (2 * softplus)};
}

template <typename Acc>
MOETRAIN_HD LoneScore<Acc> lone(Score score, Acc x) {
    return score == Score::kSigmoid ? lone_sigmoid(x) : lone_root(x);
}

// Integers in the order of the finite numbers they stand for; -0 and +0 are one, and no number maps to the least
// integer, which therefore marks what is taken or masked.
template <typename Acc>
struct OrderedKey;
template <>
struct OrderedKey<float> {
    using Int = int32_t;
    static MOETRAIN_HD Int of(float x) {
        const auto bits = std::bit_cast<Int>(x + 0.F);
        return bits ^ ((bits >> 31) & INT32_MAX);
    }
    static constexpr Int kTaken = INT32_MIN;
};
template <>
struct OrderedKey<double> {
    using Int = int64_t;
    static MOETRAIN_HD Int of(double x) {
        const auto bits = std::bit_cast<Int>(x + 0.0);
        return bits ^ ((bits >> 63) & INT64_MAX);
    }
    static constexpr Int kTaken = INT64_MIN;
};

}  // namespace moetrain
