// Emulation of ptx/mbarrier.h. The state lives in the barrier's own 8 bytes, so that a barrier that is not initialised,
// or that was overwritten, is noticed.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "cuda/ptx/launch.h"

namespace moetrain::emulation {

struct MbarrierState {
    uint64_t magic : 2;
    uint64_t phase : 1;
    uint64_t num_expected : 20;  // arrivals of a phase
    uint64_t num_pending : 20;   // arrivals that the current phase still needs
    int64_t num_bytes : 21;      // bytes that the current phase still needs; negative if they precede expect_bytes
};
static_assert(sizeof(MbarrierState) == sizeof(uint64_t));

constexpr uint64_t kMbarrierMagic = 2;

inline std::string mbarrier_name(const uint64_t* barrier) {
    return "mbarrier " + hex(current_block().shared_address(barrier));
}

inline MbarrierState load_mbarrier(const uint64_t* barrier) {
    MbarrierState state;
    std::memcpy(&state, barrier, sizeof(state));
    if (state.magic != kMbarrierMagic)
        current_block().fail(mbarrier_name(barrier) + " is used before mbarrier_init, or was overwritten");
    return state;
}

inline void store_mbarrier(uint64_t* barrier, MbarrierState state) {
    if (state.num_pending == 0 && state.num_bytes == 0) {
        state.phase ^= 1;
        state.num_pending = state.num_expected;
    }
    std::memcpy(barrier, &state, sizeof(state));
}

inline void arrive(uint64_t* barrier, int64_t num_bytes) {
    MbarrierState state = load_mbarrier(barrier);
    if (state.num_pending == 0)
        current_block().fail(mbarrier_name(barrier) + " gets more than the " + std::to_string(state.num_expected) +
                             " arrivals it was initialised for");
    state.num_pending -= 1;
    state.num_bytes += num_bytes;
    store_mbarrier(barrier, state);
}

inline void complete_bytes(uint64_t* barrier, int64_t num_bytes) {
    MbarrierState state = load_mbarrier(barrier);
    state.num_bytes -= num_bytes;
    store_mbarrier(barrier, state);
}

inline std::string describe_mbarrier(const uint64_t* barrier, uint32_t parity) {
    const MbarrierState state = load_mbarrier(barrier);
    return mbarrier_name(barrier) + " to complete the phase of parity " + std::to_string(parity) + " (its phase is " +
           std::to_string(state.phase) + ", with " + std::to_string(state.num_pending) + " of " +
           std::to_string(state.num_expected) + " arrivals and " + std::to_string(state.num_bytes) +
           " bytes outstanding)";
}

}  // namespace moetrain::emulation

namespace moetrain::ptx {

inline void mbarrier_init(uint64_t* barrier, int num_arrivals) {
    emulation::EmulatedBlock& block = emulation::current_block();
    if (block.shared_address(barrier) % 8 != 0) block.fail("an mbarrier must be 8-byte aligned");
    emulation::MbarrierState state{};
    state.magic = emulation::kMbarrierMagic;
    state.num_expected = state.num_pending = static_cast<uint64_t>(num_arrivals);
    std::memcpy(barrier, &state, sizeof(state));
    block.unfenced_mbarriers.push_back(barrier);
}

inline void fence_mbarrier_init() { emulation::current_block().unfenced_mbarriers.clear(); }

inline void mbarrier_arrive(uint64_t* barrier) {
    emulation::arrive(barrier, 0);
    emulation::current_block().yield_sometimes();
}

inline void mbarrier_arrive_expect_bytes(uint64_t* barrier, int num_bytes) {
    emulation::arrive(barrier, num_bytes);
    emulation::current_block().yield_sometimes();
}

inline void mbarrier_expect_bytes(uint64_t* barrier, int num_bytes) { emulation::complete_bytes(barrier, -num_bytes); }

inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    emulation::current_block().wait_until(
        [barrier, parity] { return emulation::load_mbarrier(barrier).phase != parity; },
        [barrier, parity] { return emulation::describe_mbarrier(barrier, parity); });
}

}  // namespace moetrain::ptx
