// A small user of named barriers that some wait at and others only arrive at, and of setmaxnreg: two warpgroups take
// turns in shared memory, and a third, the producer, gives its registers to them.
#pragma once

#include <cstdint>

#include "cuda/ptx/launch.h"
#include "cuda/ptx/warp.h"

namespace moetrain::test {

constexpr int kPingPongThreads = 384;
constexpr int kPingPongPair = 256;  // threads of the two warpgroups that take turns

// out[i] = the sum over a warpgroup's threads of the number of turns that had been taken when turn i began.
__global__ void __launch_bounds__(kPingPongThreads, 1) ping_pong_kernel(int32_t* out, int num_turns) {
    auto* turns_taken = reinterpret_cast<int32_t*>(ptx::dynamic_shared_memory());
    auto* partial = turns_taken + 1;  // one per warp
    const int warpgroup_idx = ptx::thread_idx() / 128;
    if (ptx::thread_idx() == 0) *turns_taken = 0;  // seen by the others behind the barrier of turn 0
    if (warpgroup_idx == 2) {
        ptx::shrink_registers<40>();
    } else {
        ptx::grow_registers<232>();
        const int own_barrier = 1 + warpgroup_idx;
        const int other_barrier = 2 - warpgroup_idx;
        // The second warpgroup lets the first begin.
        if (warpgroup_idx == 1) ptx::arrive_named_barrier(other_barrier, kPingPongPair);
        for (int turn = warpgroup_idx; turn < num_turns; turn += 2) {
            ptx::sync_named_barrier(own_barrier, kPingPongPair);
            const float seen = ptx::sum_over_lanes(static_cast<float>(*turns_taken));
            if (ptx::thread_idx() % 32 == 0) partial[ptx::thread_idx() / 32] = static_cast<int32_t>(seen);
            ptx::sync_named_barrier(3 + warpgroup_idx, 128);
            if (ptx::thread_idx() % 128 == 0) {
                const int32_t* own = partial + 4 * warpgroup_idx;
                out[turn] = own[0] + own[1] + own[2] + own[3];
                *turns_taken += 1;
            }
            if (turn + 1 < num_turns) ptx::arrive_named_barrier(other_barrier, kPingPongPair);
        }
    }
}

}  // namespace moetrain::test
