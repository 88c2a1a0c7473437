// The sums around an expert MLP's products, on every architecture; see sum_arguments.h. Launchers return the launch's
// error and treat no pairs, rows or slots as success.
#pragma once
#include <cuda_runtime_api.h>

#include "cuda/expert_mlp/sum_arguments.h"

namespace moetrain::experts {

cudaError_t launch_pair_sum(const PairSumArguments& arguments, cudaStream_t stream);
cudaError_t launch_weight_grad(const WeightGradArguments& arguments, cudaStream_t stream);
cudaError_t launch_slot_sum(const SlotSumArguments& arguments, cudaStream_t stream);

}  // namespace moetrain::experts
