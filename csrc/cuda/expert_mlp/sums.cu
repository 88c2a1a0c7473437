// Launchers of the sums around an expert MLP's products. Compiles with CUDA 13.
// Gate: 64 registers; LDG STG.
#include <algorithm>

#include "cuda/expert_mlp/launch.h"
#include "cuda/expert_mlp/sums.h"

namespace moetrain::experts {
namespace {

constexpr int kMaxBlocks = 1 << 16;  // grid-stride beyond this

int blocks_for(int64_t num_items) { return static_cast<int>(std::min<int64_t>(num_items, kMaxBlocks)); }

}  // namespace

cudaError_t launch_pair_sum(const PairSumArguments& arguments, cudaStream_t stream) {
    if (arguments.num_rows == 0) return cudaSuccess;
    pair_sum_kernel<<<blocks_for(arguments.num_rows), kPairSumThreads, 0, stream>>>(arguments);
    return cudaGetLastError();
}

cudaError_t launch_weight_grad(const WeightGradArguments& arguments, cudaStream_t stream) {
    if (arguments.num_pairs == 0) return cudaSuccess;
    const int num_blocks = blocks_for((arguments.num_pairs + kWeightGradThreads - 1) / kWeightGradThreads);
    weight_grad_kernel<<<num_blocks, kWeightGradThreads, 0, stream>>>(arguments);
    return cudaGetLastError();
}

cudaError_t launch_slot_sum(const SlotSumArguments& arguments, cudaStream_t stream) {
    if (arguments.num_slots == 0) return cudaSuccess;
    const int64_t num_blocks =
        arguments.num_slots * ((int64_t{arguments.width} + kSlotSumColumns - 1) / kSlotSumColumns);
    slot_sum_kernel<<<blocks_for(num_blocks), kSlotSumThreads, kSlotSumSharedBytes, stream>>>(arguments);
    return cudaGetLastError();
}

}  // namespace moetrain::experts
