// The kernels of an expert MLP on Hopper besides the plain grouped GEMMs. Launchers return the launch's error, treat no
// pairs, rows or groups as success, and throw std::invalid_argument where sizes or strides break what
// grouped_gemm_sm90/arguments.h demands. Never run on a GPU so far.
#pragma once
#include <cuda_runtime_api.h>

#include "cuda/expert_mlp_sm90/sum_arguments.h"
#include "cuda/grouped_gemm_sm90/problem.h"

namespace moetrain::sm90 {

enum class Activation : uint8_t { kSwiglu, kGelu, kRelu2 };

// H = X[row] · W_inᵀ + b_in, rounded, and A = weight * act(H before rounding). Either may be null.
struct UpProjection {
    GroupedGemmProblem product;  // a: X, b: W_in as [slots, parts * F, D], with row_indices
    Bf16* h;                     // [N, parts * F], rows h_stride apart
    int64_t h_stride;
    Bf16* a;              // [N, F]
    const float* weight;  // [N]
    const Bf16* bias;     // [slots, parts * F], slots bias_stride apart; null: none
    int64_t bias_stride;
    Activation activation;
};
cudaError_t launch_up_projection(const UpProjection& up, int num_blocks, cudaStream_t stream);

// From dA' = dY[row] · W_out and H: dH = weight * dA' * act'(H), A = weight * act(H), and <dA', act(H)> of each pair in
// parts, one per tile of F. dH may be H itself.
struct HiddenGrad {
    GroupedGemmProblem product;  // a: dY, b: W_out as [slots, D, F], with row_indices
    const Bf16* h;               // [N, parts * F], rows h_stride apart
    int64_t h_stride;
    Bf16* dh;  // [N, parts * F], rows dh_stride apart
    int64_t dh_stride;
    Bf16* a;              // [N, F]
    const float* weight;  // [N]
    float* weight_grad;   // [num_weight_grad_parts(F), N]
    int64_t num_pairs;    // N
    Activation activation;
};
int num_weight_grad_parts(int64_t hidden);
cudaError_t launch_hidden_grad(const HiddenGrad& grad, int num_blocks, cudaStream_t stream);

// See sum_arguments.h.
cudaError_t launch_pair_sum(const PairSumArguments& arguments, cudaStream_t stream);
cudaError_t launch_weight_grad(const WeightGradArguments& arguments, cudaStream_t stream);
cudaError_t launch_slot_sum(const SlotSumArguments& arguments, cudaStream_t stream);

}  // namespace moetrain::sm90
