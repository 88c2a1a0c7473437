// Runs thread blocks on the host, every thread as a fiber, to test kernels written over csrc/ptx without a GPU.
//
// The block is hostile within the rules of PTX:
//   - warps run in an order drawn from the seed, each thread until it has to wait;
//   - asynchronous copies and wgmma operand reads happen as early or as late as allowed (see Timing);
//   - shared memory, targets of copies in flight and accumulators in flight hold NaN;
//   - what PTX leaves undefined, and the block can see, ends the run with a Failure that names thread and address.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

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

struct GridOptions {
    int num_blocks;
    int num_threads;  // a multiple of 32
    size_t shared_bytes;
    uint64_t seed;
    Timing timing;
    std::vector<GlobalRange> tensors = {};  // what copies may touch of global memory; none: anything
};

// A deadlock, or something PTX does not define.
class Failure : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Runs `kernel` once per thread, one block after the other in an order drawn from the seed. Throws Failure.
void run_grid(const GridOptions& options, const std::function<void()>& kernel);

struct PendingWgmma {
    float* accumulators;
    int tile_n;
    uint64_t a_descriptor;
    uint64_t b_descriptor;
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

struct PendingCopy {
    void* shared;
    const void* global;
    bool is_valid;
};

struct EmulatedThread {
    int thread_idx = 0;

    // Scheduling
    ucontext_t context{};
    bool is_done = false;
    std::function<bool()> is_ready;          // empty: may run
    std::function<std::string()> waits_for;  // for the report of a deadlock

    // cp.async not yet tied to a barrier
    std::vector<PendingCopy> pending_copies;

    // wgmma
    std::vector<PendingWgmma> pending_wgmma;
    std::vector<AccumulatorsInFlight> accumulators_in_flight;
    bool is_wgmma_fenced = false;
    int num_wgmma_issued = 0;
    int num_wgmma_groups = 0;

    // Generic-proxy writes up to this one are ordered before the thread's later async-proxy accesses.
    uint64_t fenced_write_idx = 0;
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
    uint8_t* shared_memory() { return shared_; }

    // Does not return to the kernel.
    [[noreturn]] void fail(const std::string& what) const;

    // Blocks the thread until `is_ready`.
    void wait_until(std::function<bool()> is_ready, std::function<std::string()> waits_for);
    // After an act that others may be waiting for: lets them go first, by the seed.
    void yield_sometimes();
    void sync_named_barrier(int barrier_id, int num_threads);
    void sync_warp();

    // Runs `complete` now or later, as the timing asks; `what` names it in reports.
    void submit(std::function<void()> complete, std::string what);
    // Whether work that may happen at its issue does.
    bool happens_early();

    // Addresses as the device sees them; shared memory starts above 0 so that a null address is an error.
    static constexpr uint32_t kSharedBase = 1024;
    uint32_t shared_address(const void* pointer) const;
    uint8_t* shared_pointer(uint32_t address, size_t num_bytes) const;

    void check_global(const void* begin, size_t num_bytes, const std::string& what) const;

    // Life of a 16-byte chunk of shared memory that an asynchronous copy fills.
    void begin_copy(void* chunk);                              // from now on undefined
    void end_copy_async_proxy(void* chunk);                    // written by TMA
    void end_copy_generic_proxy(void* chunk, int writer_idx);  // written by cp.async
    // A chunk read by wgmma on behalf of `reader`.
    const uint8_t* read_async_proxy(uint32_t address, const EmulatedThread& reader) const;
    void fence_async_proxy() { running_->fenced_write_idx = num_generic_writes_; }

    // All threads of a warpgroup must issue the same wgmma.
    void check_same_in_warpgroup(int wgmma_idx, uint64_t a_descriptor, uint64_t b_descriptor);

    // mbarriers that the async proxy does not see yet
    std::vector<const uint64_t*> unfenced_mbarriers;

 private:
    struct NamedBarrier {
        int num_expected = 0;
        int num_arrived = 0;
        uint64_t generation = 0;
    };
    struct Chunk {
        int num_copies_in_flight = 0;
        uint64_t generic_write_idx = 0;  // 0: last written through the async proxy
        int writer_idx = 0;
    };
    struct AsyncWork {
        std::function<void()> complete;
        std::string what;
    };

    static void enter_fiber();
    void resume(EmulatedThread& thread);
    bool run_ready_threads(bool may_skip_warps);
    bool complete_one_async();
    std::string describe_waiting_threads() const;
    void check_nothing_left();
    void sync(NamedBarrier& barrier, int num_threads, const std::string& name);
    Chunk& chunk_of(const void* pointer);
    uint64_t random_below(uint64_t bound) { return random_() % bound; }

    const GridOptions& options_;
    int block_idx_;
    std::mt19937_64 random_;
    std::unique_ptr<uint8_t[]> shared_storage_;
    uint8_t* shared_;
    std::vector<Chunk> chunks_;
    std::vector<EmulatedThread> threads_;
    std::vector<std::unique_ptr<std::byte[]>>& stacks_;
    std::vector<NamedBarrier> named_barriers_;
    std::vector<NamedBarrier> warp_barriers_;
    std::vector<AsyncWork> async_work_;
    std::vector<std::vector<std::pair<uint64_t, uint64_t>>> warpgroup_wgmma_;
    uint64_t num_generic_writes_ = 0;

    const std::function<void()>* kernel_ = nullptr;
    EmulatedThread* running_ = nullptr;
    ucontext_t scheduler_context_{};
    std::exception_ptr failure_;
};

// The block whose thread is running: the one piece of global state, as threadIdx is on the device.
EmulatedBlock& current_block();

std::string hex(uint64_t value);

}  // namespace moetrain::emulation
