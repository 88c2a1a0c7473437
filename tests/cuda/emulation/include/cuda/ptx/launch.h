// Emulation of ptx/launch.h.
#pragma once

#include <cstdint>

#include "cuda_qualifiers.h"
#include "emulation/block_runner.h"

namespace moetrain::ptx {

inline int thread_idx() { return emulation::current_block().thread().thread_idx; }
inline int block_idx() { return emulation::current_block().block_idx(); }
inline int num_blocks() { return emulation::current_block().options().num_blocks; }

inline uint8_t* dynamic_shared_memory() { return emulation::current_block().shared().dynamic(); }
inline uint32_t shared_address(const void* pointer) { return emulation::current_block().shared_address(pointer); }

inline void sync_named_barrier(int barrier_id, int num_threads) {
    emulation::current_block().sync_named_barrier(barrier_id, num_threads);
}
inline void arrive_named_barrier(int barrier_id, int num_threads) {
    emulation::current_block().arrive_named_barrier(barrier_id, num_threads);
}
inline void sync_block() { sync_named_barrier(0, emulation::current_block().options().num_threads); }
inline void sync_warp() { emulation::current_block().sync_warp(); }

// Only the pool is emulated: whether the code makes do with its registers, the compile gate says.
template <int kNumRegisters>
void shrink_registers() {
    static_assert(kNumRegisters >= 24 && kNumRegisters <= 256 && kNumRegisters % 8 == 0);
    emulation::current_block().set_registers(kNumRegisters);
}
template <int kNumRegisters>
void grow_registers() {
    static_assert(kNumRegisters >= 24 && kNumRegisters <= 256 && kNumRegisters % 8 == 0);
    emulation::current_block().set_registers(kNumRegisters);
}

}  // namespace moetrain::ptx
