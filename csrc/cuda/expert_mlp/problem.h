// What the products around an expert MLP's activation compute, for their callers.
#pragma once
#include <cstdint>

#include "cuda/grouped_gemm/problem.h"

namespace moetrain::experts {

enum class Activation : uint8_t { kSwiglu, kGelu, kRelu2 };

// H = X[row] · W_inᵀ + b_in, rounded, and A = weight * act(H before rounding). Either may be null.
struct UpProjection {
    gemm::GroupedGemmProblem product;  // a: X, b: W_in as [slots, parts * F, D], with row_indices
    Bf16* h;                           // [N, parts * F], rows h_stride apart
    int64_t h_stride;
    Bf16* a;              // [N, F]
    const float* weight;  // [N]
    const Bf16* bias;     // [slots, parts * F], slots bias_stride apart; null: none
    int64_t bias_stride;
    Activation activation;
};

// From dA' = dY[row] · W_out and H: dH = weight * dA' * act'(H), A = weight * act(H), and <dA', act(H)> of each pair in
// parts, one per tile of F. dH may be H itself.
struct HiddenGrad {
    gemm::GroupedGemmProblem product;  // a: dY, b: W_out as [slots, D, F], with row_indices
    const Bf16* h;                     // [N, parts * F], rows h_stride apart
    int64_t h_stride;
    Bf16* dh;  // [N, parts * F], rows dh_stride apart
    int64_t dh_stride;
    Bf16* a;              // [N, F]
    const float* weight;  // [N]
    float* weight_grad;   // [num_weight_grad_parts(F), N]
    int64_t num_pairs;    // N
    Activation activation;
};

}  // namespace moetrain::experts
