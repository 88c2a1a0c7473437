// Emulation of ptx/cp_async.h. Copies land with the arrival that announces them.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "cuda/ptx/launch.h"
#include "cuda/ptx/mbarrier.h"

namespace moetrain::ptx {

inline void cp_async_16_bytes(void* shared, const void* global, bool is_valid) {
    emulation::EmulatedBlock& block = emulation::current_block();
    if (block.shared_address(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0)
        block.fail("cp.async of 16 bytes needs addresses that are multiples of 16");
    if (is_valid) block.check_global(global, 16, "cp.async");
    block.begin_copy(shared);
    block.thread().pending_copies.push_back({shared, global, is_valid});
}

inline void cp_async_arrive(uint64_t* barrier) {
    emulation::EmulatedBlock& block = emulation::current_block();
    const int writer_idx = block.thread().thread_idx;
    std::vector<emulation::PendingCopy> copies = std::exchange(block.thread().pending_copies, {});
    block.submit(
        [&block, barrier, writer_idx, copies = std::move(copies)] {
            for (const emulation::PendingCopy& copy : copies) {
                if (copy.is_valid)
                    std::memcpy(copy.shared, copy.global, 16);
                else
                    std::memset(copy.shared, 0, 16);
                block.end_copy_generic_proxy(copy.shared, writer_idx);
            }
            emulation::arrive(barrier, 0);
        },
        "cp.async of thread " + std::to_string(writer_idx));
}

inline void fence_async_proxy() { emulation::current_block().fence_async_proxy(); }

}  // namespace moetrain::ptx
