#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/round_pairs_math.h"

namespace moetrain {

constexpr int64_t kMaxWorldToRound = 8192;  // a number per rank must fit in shared memory

// int64 elements of scratch that launch_round_pairs needs.
int64_t round_pairs_scratch_size(int64_t num_experts, int64_t world);

// See round_pairs.h in csrc/ops. Offers must be without fault, the tile at most kMaxTileToRound, the world at most
// kMaxWorldToRound.
cudaError_t launch_round_pairs(const RoundInput& in, const RoundOutput& out, int64_t* scratch, cudaStream_t stream);

}  // namespace moetrain
