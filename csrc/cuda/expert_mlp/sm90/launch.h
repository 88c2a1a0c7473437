// The products around an expert MLP's activation, on Hopper. Launchers return the launch's error, treat no pairs, rows
// or groups as success, and throw std::invalid_argument where sizes or strides break what grouped_gemm/sm90/arguments.h
// demands.
#pragma once
#include <cuda_runtime_api.h>

#include "cuda/expert_mlp/problem.h"

namespace moetrain::sm90 {

cudaError_t launch_up_projection(const experts::UpProjection& up, int num_blocks, cudaStream_t stream);

int num_weight_grad_parts(int64_t hidden);
cudaError_t launch_hidden_grad(const experts::HiddenGrad& grad, int num_blocks, cudaStream_t stream);

}  // namespace moetrain::sm90
