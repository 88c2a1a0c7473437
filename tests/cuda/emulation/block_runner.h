// Runs thread blocks on the host, every thread as a fiber, to test kernels written over csrc/cuda/ptx without a GPU.
//
// The block is hostile within the rules of PTX:
//   - warps run in an order drawn from the seed, each thread until it has to wait;
//   - asynchronous copies and wgmma operand reads happen as early or as late as allowed (see Timing);
//   - shared memory, targets of copies in flight and accumulators in flight hold NaN;
//   - what PTX leaves undefined, and the block can see, ends the run with a Failure that names thread and address.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda/common/major.h"
#include "emulation/failure.h"
#include "emulation/fiber.h"
#include "emulation/shared_memory.h"

namespace moetrain::emulation {

// When asynchronous work happens between its issue and the wait that may rely on it.
enum class Timing {
    kEarly,   // at issue
    kLate,    // copies once every thread waits, wgmma at the wait that retires it
    kRandom,  // each one drawn from the seed
};

struct GlobalRange {
    const void* begin;
    size_t num_bytes;
};

struct Shape {
    unsigned x = 1, y = 1, z = 1;
};

struct GridOptions {
    int num_blocks;
    int num_threads;  // a multiple of 32
    size_t shared_bytes;
    uint64_t seed;
    Timing timing;
    Shape grid_shape = {0, 0, 0};           // of num_blocks; 0: a line
    Shape block_shape = {0, 0, 0};          // of num_threads; 0: a line
    std::vector<GlobalRange> tensors = {};  // what copies may touch of global memory; none: anything
};

// Runs `kernel` once per thread, one block after the other in an order drawn from the seed. Throws Failure.
void run_grid(const GridOptions& options, const std::function<void()>& kernel);

struct PendingWgmma {
    float* accumulators;
    int tile_n;
    uint64_t a_descriptor;
    uint64_t b_descriptor;
    Major major_a;
    Major major_b;
    bool accumulate;
    bool is_executed;
    int group_idx;
};

// What the accumulators of a thread really hold while the thread itself sees NaN.
struct AccumulatorsInFlight {
    float* accumulators;
    std::vector<float> values;
    int num_pending;
};

// A cp.async.
struct PendingCopy {
    void* shared;
    const void* global;
    bool is_valid;
    int writer_idx;
    int group_idx;
    bool is_done = false;
};

// A copy from shared to global memory: first `read` takes the shared bytes, then `write` puts them in place.
struct PendingStore {
    std::function<void()> read;
    std::function<void()> write;
    int group_idx;
    bool is_read = false;
    bool is_written = false;
};

struct EmulatedThread {
    int thread_idx = 0;

    // Scheduling
    Context context;
    bool is_done = false;
    bool is_held_back = false;
    std::function<bool()> is_ready;          // empty: may run
    std::function<std::string()> waits_for;  // for the report of a deadlock

    // cp.async that neither a barrier nor a wait has ended
    std::vector<std::shared_ptr<PendingCopy>> pending_copies;
    int num_copy_groups = 0;

    // TMA and bulk stores
    std::vector<PendingStore> pending_stores;
    int num_store_groups = 0;

    // wgmma
    std::vector<PendingWgmma> pending_wgmma;
    std::vector<AccumulatorsInFlight> accumulators_in_flight;
    bool is_wgmma_fenced = false;
    int num_wgmma_issued = 0;
    int num_wgmma_groups = 0;

    int num_registers = 0;
};

class EmulatedBlock {
 public:
    EmulatedBlock(const GridOptions& options, int block_idx, uint64_t seed,
                  std::vector<std::unique_ptr<std::byte[]>>& stacks);

    void run(const std::function<void()>& kernel);

    // --- called from the emulated primitives, on the fiber of the thread concerned ---

    int block_idx() const { return block_idx_; }
    const GridOptions& options() const { return options_; }
    EmulatedThread& thread() { return *running_; }
    SharedMemory& shared() { return shared_; }

    // Does not return to the kernel.
    [[noreturn]] void fail(const std::string& what) const;

    // Blocks the thread until `is_ready`.
    void wait_until(std::function<bool()> is_ready, std::function<std::string()> waits_for);
    // After an act that others may be waiting for: lets them go first, by the seed.
    void yield_sometimes();
    void sync_named_barrier(int barrier_id, int num_threads);
    void arrive_named_barrier(int barrier_id, int num_threads);
    // Waits for all lanes in `mask`, this thread's among them; the last to come runs `act` over what each brought.
    using Lanes = std::array<void*, 32>;
    void meet_in_warp(const char* what, uint32_t mask, void* brought, const std::function<void(const Lanes&)>& act);
    void sync_warp(uint32_t mask = 0xFFFFFFFF);
    // setmaxnreg: waits until the block's pool has the registers.
    void set_registers(int num_registers);

    // Runs `complete` now or later, as the timing asks; `what` names it in reports.
    void submit(std::function<void()> complete, std::string what);
    // Whether work that may happen at its issue does.
    bool happens_early();

    // Fails where `what` touches global memory outside the tensors that the test names.
    void check_global(const void* begin, size_t num_bytes, const std::string& what) const;

    // All threads of a warpgroup must issue the same wgmma.
    void check_same_in_warpgroup(int wgmma_idx, uint64_t a_descriptor, uint64_t b_descriptor);

    uint32_t shared_address(const void* pointer) const { return shared_.address(pointer); }

    // mbarriers that the async proxy does not see yet
    std::vector<const uint64_t*> unfenced_mbarriers;

 private:
    struct NamedBarrier {
        int num_expected = 0;
        int num_arrived = 0;
        uint64_t generation = 0;
    };
    struct Meeting {
        const char* what;
        uint32_t mask;
        uint32_t arrived = 0;
        uint64_t generation = 0;
        Lanes brought{};
    };
    struct AsyncWork {
        std::function<void()> complete;
        std::string what;
    };

    static void enter_fiber();
    void resume(EmulatedThread& thread);
    void choose_held_back();
    bool run_ready_threads(bool may_hold_back);
    bool complete_one_async();
    std::string describe_waiting_threads() const;
    void check_nothing_left();
    NamedBarrier& named_barrier(int barrier_id, int num_threads, const std::string& name);
    bool arrive(NamedBarrier& barrier, int num_threads, const std::string& name);
    uint64_t random_below(uint64_t bound) { return random_() % bound; }

    const GridOptions& options_;
    int block_idx_;
    std::mt19937_64 random_;
    SharedMemory shared_;
    std::vector<EmulatedThread> threads_;
    std::vector<std::unique_ptr<std::byte[]>>& stacks_;
    std::vector<NamedBarrier> named_barriers_;
    std::vector<std::vector<std::unique_ptr<Meeting>>> meetings_;  // per warp, one for each mask
    std::vector<AsyncWork> async_work_;
    std::vector<std::vector<std::pair<uint64_t, uint64_t>>> warpgroup_wgmma_;
    int num_free_registers_;

    const std::function<void()>* kernel_ = nullptr;
    EmulatedThread* running_ = nullptr;
    Context scheduler_context_;
    std::exception_ptr failure_;
};

// The block whose thread is running: the one piece of global state, as threadIdx is on the device.
EmulatedBlock& current_block();

}  // namespace moetrain::emulation
