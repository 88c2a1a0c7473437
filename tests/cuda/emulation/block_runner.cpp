#include "emulation/block_runner.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <numeric>
#include <sstream>

namespace moetrain::emulation {

namespace {

constexpr int kWarpSize = 32;
constexpr int kNumNamedBarriers = 16;
constexpr size_t kStackBytes = 128 * 1024;
constexpr int kRegistersPerMultiprocessor = 65536;
constexpr int kMaxRegisters = 248;  // the largest multiple of 8 below 255

// What a kernel under __launch_bounds__(num_threads, 1) starts with at most; setmaxnreg deals out these and no more.
int registers_at_start(int num_threads) {
    return std::min(kRegistersPerMultiprocessor / num_threads / 8 * 8, kMaxRegisters);
}

EmulatedBlock* g_current_block = nullptr;

}  // namespace

EmulatedBlock& current_block() { return *g_current_block; }

std::string hex(uint64_t value) {
    std::ostringstream out;
    out << "0x" << std::hex << value;
    return out.str();
}

void run_grid(const GridOptions& options, const std::function<void()>& kernel) {
    if (options.num_threads <= 0 || options.num_threads % kWarpSize != 0)
        throw std::invalid_argument("run_grid: num_threads must be a positive multiple of 32, got " +
                                    std::to_string(options.num_threads));
    std::mt19937_64 random(options.seed);
    std::vector<int> order(options.num_blocks);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);

    // Kept from grid to grid: what is new to the process costs a page fault a thread.
    static std::vector<std::unique_ptr<std::byte[]>> stacks;
    while (stacks.size() < static_cast<size_t>(options.num_threads))
        stacks.push_back(std::make_unique_for_overwrite<std::byte[]>(kStackBytes));
    for (const int block_idx : order) {
        EmulatedBlock block(options, block_idx, random(), stacks);
        block.run(kernel);
    }
}

EmulatedBlock::EmulatedBlock(const GridOptions& options, int block_idx, uint64_t seed,
                             std::vector<std::unique_ptr<std::byte[]>>& stacks)
    : options_(options),
      block_idx_(block_idx),
      random_(seed),
      shared_(options.shared_bytes, options.num_threads, [this](const std::string& what) { fail(what); }),
      threads_(options.num_threads),
      stacks_(stacks),
      named_barriers_(kNumNamedBarriers),
      meetings_(options.num_threads / kWarpSize),
      warpgroup_wgmma_(options.num_threads / (4 * kWarpSize) + 1),
      num_free_registers_(0) {}

// --- Scheduling ---

void EmulatedBlock::enter_fiber() {
    EmulatedBlock& block = current_block();
    EmulatedThread& thread = block.thread();
    arrive_on_fiber(block.scheduler_context_);
    try {
        (*block.kernel_)();
    } catch (...) {
        if (!block.failure_) block.failure_ = std::current_exception();
    }
    thread.is_done = true;
    switch_context(thread.context, block.scheduler_context_, true);
}

void EmulatedBlock::run(const std::function<void()>& kernel) {
    kernel_ = &kernel;
    g_current_block = this;
    for (int i = 0; i < options_.num_threads; ++i) {
        EmulatedThread& thread = threads_[i];
        thread.thread_idx = i;
        thread.num_registers = registers_at_start(options_.num_threads);
        prepare_fiber(thread.context, stacks_[i].get(), kStackBytes, &EmulatedBlock::enter_fiber);
    }
    choose_held_back();
    const auto is_done = [](const EmulatedThread& thread) { return thread.is_done; };
    while (!std::all_of(threads_.begin(), threads_.end(), is_done)) {
        const bool has_progressed = run_ready_threads(true) || run_ready_threads(false) || complete_one_async();
        if (!has_progressed)
            throw Failure("deadlock in block " + std::to_string(block_idx_) + describe_waiting_threads());
    }
    check_nothing_left();
    g_current_block = nullptr;
}

// Half of the warps, and of a quarter some lanes, stay where they are until nothing else can move or the choice
// changes: threads drift apart as far as nothing keeps them together.
void EmulatedBlock::choose_held_back() {
    for (int first = 0; first < options_.num_threads; first += kWarpSize) {
        uint32_t lanes = 0;
        if (random_below(2) == 0)
            lanes = 0xFFFFFFFF;
        else if (random_below(2) == 0)
            lanes = static_cast<uint32_t>(random_());
        for (int lane = 0; lane < kWarpSize; ++lane)
            threads_[first + lane].is_held_back = (lanes >> lane & 1) != 0;
    }
}

bool EmulatedBlock::run_ready_threads(bool may_hold_back) {
    constexpr int kPassesPerChoice = 6;  // on average
    if (may_hold_back && random_below(kPassesPerChoice) == 0) choose_held_back();
    std::vector<int> warps(options_.num_threads / kWarpSize);
    std::iota(warps.begin(), warps.end(), 0);
    std::shuffle(warps.begin(), warps.end(), random_);
    bool has_progressed = false;
    for (const int warp_idx : warps) {
        const int first_lane = static_cast<int>(random_below(kWarpSize));
        for (int i = 0; i < kWarpSize; ++i) {
            EmulatedThread& thread = threads_[warp_idx * kWarpSize + (first_lane + i) % kWarpSize];
            if (thread.is_done || (may_hold_back && thread.is_held_back)) continue;
            if (thread.is_ready && !thread.is_ready()) continue;
            resume(thread);
            has_progressed = true;
        }
        if (options_.timing == Timing::kRandom && random_below(2) == 0 && complete_one_async()) has_progressed = true;
    }
    return has_progressed;
}

void EmulatedBlock::resume(EmulatedThread& thread) {
    thread.is_ready = nullptr;
    running_ = &thread;
    switch_context(scheduler_context_, thread.context);
    running_ = nullptr;
    if (failure_) std::rethrow_exception(failure_);
}

void EmulatedBlock::wait_until(std::function<bool()> is_ready, std::function<std::string()> waits_for) {
    if (is_ready()) return;
    EmulatedThread& thread = *running_;
    thread.is_ready = std::move(is_ready);
    thread.waits_for = std::move(waits_for);
    switch_context(thread.context, scheduler_context_);
}

void EmulatedBlock::yield_sometimes() {
    if (random_below(2) == 0) return;
    switch_context(running_->context, scheduler_context_);
}

void EmulatedBlock::fail(const std::string& what) const {
    std::string who = "block " + std::to_string(block_idx_);
    if (running_) who += ", thread " + std::to_string(running_->thread_idx);
    throw Failure(who + ": " + what);
}

std::string EmulatedBlock::describe_waiting_threads() const {
    std::map<std::string, std::vector<int>> waiting;
    for (const EmulatedThread& thread : threads_)
        if (!thread.is_done) waiting[thread.waits_for()].push_back(thread.thread_idx);
    std::string report;
    for (const auto& [what, thread_idxs] : waiting)
        report += "\n  " + std::to_string(thread_idxs.size()) + " threads, from " +
                  std::to_string(thread_idxs.front()) + " to " + std::to_string(thread_idxs.back()) + ", wait for " +
                  what;
    return report;
}

void EmulatedBlock::check_nothing_left() {
    if (!async_work_.empty())
        fail(std::to_string(async_work_.size()) + " copies in flight at the end of the block, among them " +
             async_work_.front().what);
    for (int i = 0; i < kNumNamedBarriers; ++i)
        if (named_barriers_[i].num_arrived > 0)
            fail("named barrier " + std::to_string(i) + " is left with " +
                 std::to_string(named_barriers_[i].num_arrived) + " of " +
                 std::to_string(named_barriers_[i].num_expected) + " arrivals at the end of the block");
    for (EmulatedThread& thread : threads_) {
        for (PendingStore& store : thread.pending_stores)
            if (store.is_read && !store.is_written) store.write();
        std::erase_if(thread.pending_stores, [](const PendingStore& store) { return store.is_read; });
        if (!thread.pending_copies.empty() || !thread.pending_wgmma.empty() || !thread.pending_stores.empty())
            fail("thread " + std::to_string(thread.thread_idx) +
                 " ends with work that it did not wait for: " + std::to_string(thread.pending_copies.size()) +
                 " cp.async, " + std::to_string(thread.pending_wgmma.size()) + " wgmma, " +
                 std::to_string(thread.pending_stores.size()) + " stores from shared memory");
    }
}

// --- Barriers among threads ---

EmulatedBlock::NamedBarrier& EmulatedBlock::named_barrier(int barrier_id, int num_threads, const std::string& name) {
    if (barrier_id < 0 || barrier_id >= kNumNamedBarriers || num_threads <= 0 || num_threads % kWarpSize != 0)
        fail(name + " of " + std::to_string(num_threads) + " threads: ids are 0 to 15, counts multiples of 32");
    return named_barriers_[barrier_id];
}

// Whether the barrier opens.
bool EmulatedBlock::arrive(NamedBarrier& barrier, int num_threads, const std::string& name) {
    if (barrier.num_arrived == 0) barrier.num_expected = num_threads;
    if (barrier.num_expected != num_threads)
        fail(name + " is entered with " + std::to_string(num_threads) + " threads, by others with " +
             std::to_string(barrier.num_expected));
    if (++barrier.num_arrived < barrier.num_expected) return false;
    barrier.num_arrived = 0;
    ++barrier.generation;
    return true;
}

void EmulatedBlock::sync_named_barrier(int barrier_id, int num_threads) {
    const std::string name = "named barrier " + std::to_string(barrier_id);
    NamedBarrier& barrier = named_barrier(barrier_id, num_threads, name);
    if (arrive(barrier, num_threads, name)) return;
    const uint64_t generation = barrier.generation;
    wait_until([&barrier, generation] { return barrier.generation != generation; },
               [&barrier, name] {
                   return name + " (" + std::to_string(barrier.num_arrived) + " of " +
                          std::to_string(barrier.num_expected) + " threads are there)";
               });
}

void EmulatedBlock::arrive_named_barrier(int barrier_id, int num_threads) {
    const std::string name = "named barrier " + std::to_string(barrier_id);
    arrive(named_barrier(barrier_id, num_threads, name), num_threads, name);
    yield_sometimes();
}

void EmulatedBlock::meet_in_warp(const char* what, uint32_t mask, void* brought,
                                 const std::function<void(const Lanes&)>& act) {
    const int warp_idx = running_->thread_idx / kWarpSize;
    const int lane_idx = running_->thread_idx % kWarpSize;
    if ((mask >> lane_idx & 1) == 0) fail(std::string(what) + " by a lane that its mask " + hex(mask) + " leaves out");
    auto& meetings = meetings_[warp_idx];
    auto entry = std::find_if(meetings.begin(), meetings.end(), [&](const auto& m) { return m->mask == mask; });
    if (entry == meetings.end()) entry = meetings.insert(entry, std::make_unique<Meeting>(Meeting{what, mask}));
    Meeting& meeting = **entry;
    if (meeting.arrived == 0) meeting.what = what;
    if (std::strcmp(meeting.what, what) != 0)
        fail("lanes of warp " + std::to_string(warp_idx) + " meet in " + meeting.what + " and in " + what);
    meeting.brought[lane_idx] = brought;
    meeting.arrived |= 1U << lane_idx;
    if (meeting.arrived == mask) {
        meeting.arrived = 0;
        ++meeting.generation;
        act(meeting.brought);
        yield_sometimes();
        return;
    }
    const uint64_t generation = meeting.generation;
    wait_until([&meeting, generation] { return meeting.generation != generation; },
               [&meeting, warp_idx] {
                   return std::string(meeting.what) + " of warp " + std::to_string(warp_idx) + " (lanes " +
                          hex(meeting.arrived) + " of " + hex(meeting.mask) + " are there)";
               });
}

void EmulatedBlock::sync_warp(uint32_t mask) {
    meet_in_warp("sync_warp", mask, nullptr, [](const Lanes&) {});
}

void EmulatedBlock::set_registers(int num_registers) {
    EmulatedThread& thread = *running_;
    const int wanted = num_registers - thread.num_registers;
    wait_until([this, wanted] { return num_free_registers_ >= wanted; },
               [this, num_registers] {
                   return std::to_string(num_registers) + " registers each; the block's pool has " +
                          std::to_string(num_free_registers_);
               });
    num_free_registers_ -= wanted;
    thread.num_registers = num_registers;
}

// --- Asynchronous work ---

bool EmulatedBlock::happens_early() {
    return options_.timing == Timing::kEarly || (options_.timing == Timing::kRandom && random_below(2) == 0);
}

void EmulatedBlock::submit(std::function<void()> complete, std::string what) {
    if (options_.timing == Timing::kEarly)
        complete();
    else
        async_work_.push_back({std::move(complete), std::move(what)});
}

bool EmulatedBlock::complete_one_async() {
    if (async_work_.empty()) return false;
    std::swap(async_work_[random_below(async_work_.size())], async_work_.back());
    const AsyncWork work = std::move(async_work_.back());
    async_work_.pop_back();
    work.complete();
    return true;
}

// --- Checks ---

void EmulatedBlock::check_global(const void* begin, size_t num_bytes, const std::string& what) const {
    const auto address = reinterpret_cast<uintptr_t>(begin);
    const auto holds = [address, num_bytes](const GlobalRange& range) {
        const auto range_begin = reinterpret_cast<uintptr_t>(range.begin);
        return address >= range_begin && address + num_bytes <= range_begin + range.num_bytes;
    };
    if (!options_.tensors.empty() && std::none_of(options_.tensors.begin(), options_.tensors.end(), holds))
        fail(what + " touches " + std::to_string(num_bytes) + " bytes of global memory outside every tensor");
}

void EmulatedBlock::check_same_in_warpgroup(int wgmma_idx, uint64_t a_descriptor, uint64_t b_descriptor) {
    auto& issued = warpgroup_wgmma_[running_->thread_idx / (4 * kWarpSize)];
    const std::pair descriptors(a_descriptor, b_descriptor);
    if (static_cast<size_t>(wgmma_idx) == issued.size())
        issued.push_back(descriptors);
    else if (issued[wgmma_idx] != descriptors)
        fail("wgmma " + std::to_string(wgmma_idx) + " has other descriptors than in other threads of the warpgroup");
}

}  // namespace moetrain::emulation
