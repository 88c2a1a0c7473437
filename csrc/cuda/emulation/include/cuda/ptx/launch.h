// Emulation of ptx/launch.h.
#pragma once

#include <cstdint>

#include "cuda/emulation/block_runner.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

namespace moetrain::ptx {

inline int thread_idx() { return emulation::current_block().thread().thread_idx; }
inline int block_idx() { return emulation::current_block().block_idx(); }
inline int num_blocks() { return emulation::current_block().options().num_blocks; }

inline uint8_t* dynamic_shared_memory() { return emulation::current_block().shared_memory(); }
inline uint32_t shared_address(const void* pointer) { return emulation::current_block().shared_address(pointer); }

inline void sync_named_barrier(int barrier_id, int num_threads) {
    emulation::current_block().sync_named_barrier(barrier_id, num_threads);
}
inline void sync_block() { sync_named_barrier(0, emulation::current_block().options().num_threads); }
inline void sync_warp() { emulation::current_block().sync_warp(); }

// Registers are the compiler's business: the compile gate checks them.
template <int kNumRegisters>
void shrink_registers() {
    static_assert(kNumRegisters >= 24 && kNumRegisters <= 256 && kNumRegisters % 8 == 0);
}
template <int kNumRegisters>
void grow_registers() {
    static_assert(kNumRegisters >= 24 && kNumRegisters <= 256 && kNumRegisters % 8 == 0);
}

}  // namespace moetrain::ptx
