#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace moetrain {

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
