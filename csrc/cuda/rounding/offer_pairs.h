#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/round_pairs_math.h"

namespace moetrain {

constexpr int64_t kMaxTileToRound = 1024;  // a list of offers must fit in shared memory

// Bytes of scratch that launch_offer_pairs needs, 16-byte aligned.
int64_t offer_pairs_scratch_bytes(int64_t num_tokens, int64_t num_experts, int64_t tile, int64_t score_bytes);

// See round_pairs.h in csrc/ops; writes all of offers_EX and token_E2M. Pairs must be as group_pairs orders them, and
// the tile at most kMaxTileToRound. Acc is float or double.
template <typename Acc>
cudaError_t launch_offer_pairs(const OfferInput<Acc>& in, int64_t* offers_EX, int32_t* token_E2M, void* scratch,
                               cudaStream_t stream);

extern template cudaError_t launch_offer_pairs(const OfferInput<float>&, int64_t*, int32_t*, void*, cudaStream_t);
extern template cudaError_t launch_offer_pairs(const OfferInput<double>&, int64_t*, int32_t*, void*, cudaStream_t);

}  // namespace moetrain
