#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

// Of MKL, where torch is built with it: how many threads its products may take, on the calling thread; 0 is its own
// choice.
extern "C" int MKL_Set_Num_Threads_Local(int num_threads) __attribute__((weak));

namespace moetrain {

// While it lives, MKL computes products of this thread on one thread, and by the same sums whether a parallel region is
// around it or not: on Intel's machines those differ where MKL may choose (torch 2.13).
class OneThreadEach {
 public:
    OneThreadEach() : before_(MKL_Set_Num_Threads_Local ? MKL_Set_Num_Threads_Local(1) : 0) {}
    ~OneThreadEach() {
        if (MKL_Set_Num_Threads_Local) MKL_Set_Num_Threads_Local(before_);
    }
    OneThreadEach(const OneThreadEach&) = delete;
    OneThreadEach& operator=(const OneThreadEach&) = delete;

 private:
    int before_;
};

// Calls make_worker() once per thread and the worker with each task of [0, num_tasks) once, the next free thread
// taking the next task. Tasks must be cut without looking at the number of threads; then results do not depend on it,
// since no task threads itself: a GEMM that does may cut its sums by the number of threads.
template <typename MakeWorker>
void run_tasks(int64_t num_tasks, const MakeWorker& make_worker) {
    if (num_tasks == 0) return;
    // Two at least: a range of one would run outside of a parallel region, where a lone task may thread itself.
    const int64_t num_workers = std::clamp<int64_t>(num_tasks, 2, std::max(2, at::get_num_threads()));
    std::atomic<int64_t> next{0};
    at::parallel_for(0, num_workers, 1, [&](int64_t begin, int64_t end) {
        const OneThreadEach products;
        for (int64_t i = begin; i < end; ++i) {
            int64_t task = next++;
            if (task >= num_tasks) continue;
            auto worker = make_worker();
            for (; task < num_tasks; task = next++)
                worker(task);
        }
    });
}

}  // namespace moetrain
