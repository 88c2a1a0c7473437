#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "common/assign_seats_math.h"

namespace moetrain {

// int32 elements of scratch that launch_assign_seats needs.
int64_t assign_seats_scratch_size(const SeatProblem& in, int64_t num_seats);

// seat[num_pairs]: the seat of each pair, -1 behind the last one; the CPU's, bit for bit. The problem must be without
// fault, and its lists are on the device.
cudaError_t launch_assign_seats(const SeatProblem& in, int64_t num_pairs, int64_t num_seats, int32_t* seat,
                                int32_t* scratch, cudaStream_t stream);

}  // namespace moetrain
