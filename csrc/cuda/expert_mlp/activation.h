// The activations of an expert, their slopes, and what they make of a fragment's numbers. fp32.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda/ptx/launch.h"
#include "cuda/ptx/math.h"

namespace moetrain::experts {

enum class UngatedActivation : uint8_t { kGelu, kRelu2 };

struct ValueAndSlope {
    float value;
    float slope;
};

__device__ inline float sigmoid(float x) { return ptx::fast_divide(1.0f, 1.0f + ptx::fast_exp(-x)); }

// gelu by the error function, or relu squared.
__device__ inline ValueAndSlope activate(UngatedActivation activation, float x) {
    if (activation == UngatedActivation::kRelu2) {
        const float positive = x > 0 || x != x ? x : 0.0f;  // NaN stays NaN
        return {positive * positive, 2 * positive};
    }
    const float cdf = 0.5f * erfcf(-0.70710678f * x);
    const float density = 0.39894228f * ptx::fast_exp(-0.5f * x * x);
    return {x * cdf, cdf + x * density};
}

// a = silu(gate) * up, and what a gradient da of it means for gate and up.
struct GatedGradient {
    float activated;
    float dgate;
    float dup;
};

__device__ inline float swiglu(float gate, float up) { return gate * sigmoid(gate) * up; }

__device__ inline GatedGradient swiglu_gradient(float gate, float up, float da) {
    const float s = sigmoid(gate);
    const float silu = gate * s;
    return {silu * up, da * up * (s + silu * (1 - s)), da * silu};
}

}  // namespace moetrain::experts
