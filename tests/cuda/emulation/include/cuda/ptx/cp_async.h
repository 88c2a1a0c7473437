// Emulation of ptx/cp_async.h. Copies land with the arrival or the wait that announces them, or early at their issue.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "cuda/ptx/launch.h"
#include "cuda/ptx/mbarrier.h"

namespace moetrain::emulation {

using PendingCopies = std::vector<std::shared_ptr<PendingCopy>>;

inline void complete(EmulatedBlock& block, PendingCopy& copy) {
    if (copy.is_done) return;
    copy.is_done = true;
    if (copy.is_valid)
        std::memcpy(copy.shared, copy.global, 16);
    else
        std::memset(copy.shared, 0, 16);
    block.shared().end_copy_generic_proxy(copy.shared, copy.writer_idx);
}

}  // namespace moetrain::emulation

namespace moetrain::ptx {

inline void cp_async_16_bytes(void* shared, const void* global, bool is_valid) {
    emulation::EmulatedBlock& block = emulation::current_block();
    emulation::EmulatedThread& thread = block.thread();
    if (block.shared_address(shared) % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0)
        block.fail("cp.async of 16 bytes needs addresses that are multiples of 16");
    if (is_valid) block.check_global(global, 16, "cp.async");
    block.shared().begin_copy(shared);
    thread.pending_copies.push_back(std::make_shared<emulation::PendingCopy>(
        emulation::PendingCopy{shared, global, is_valid, thread.thread_idx, thread.num_copy_groups}));
    if (block.happens_early()) complete(block, *thread.pending_copies.back());
}

inline void cp_async_arrive(uint64_t* barrier) {
    emulation::EmulatedBlock& block = emulation::current_block();
    // A copy may also belong to a group: whoever comes first makes it land.
    emulation::PendingCopies copies = block.thread().pending_copies;
    block.thread().pending_copies.clear();
    block.submit(
        [&block, barrier, copies] {
            for (const auto& copy : copies)
                complete(block, *copy);
            emulation::arrive(barrier, 0);
        },
        "cp.async of thread " + std::to_string(block.thread().thread_idx));
}

inline void cp_async_commit() { emulation::current_block().thread().num_copy_groups += 1; }

template <int kNumPending>
void cp_async_wait() {
    emulation::EmulatedBlock& block = emulation::current_block();
    emulation::EmulatedThread& thread = block.thread();
    const int first_pending_group = thread.num_copy_groups - kNumPending;
    std::erase_if(thread.pending_copies, [&](const std::shared_ptr<emulation::PendingCopy>& copy) {
        if (copy->group_idx >= first_pending_group) return false;
        complete(block, *copy);
        return true;
    });
    block.yield_sometimes();  // to threads that have yet to wait for theirs
}

}  // namespace moetrain::ptx
