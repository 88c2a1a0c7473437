#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace moetrain {

// Calls make_worker() once per thread and the worker with each task of [0, num_tasks) once, the next free thread
// taking the next task. Tasks are cut without looking at the number of threads, so results do not depend on it.
// A single task runs on the calling thread and may thread itself.
template <typename MakeWorker>
void run_tasks(int64_t num_tasks, const MakeWorker& make_worker) {
    if (num_tasks == 0) return;
    const int64_t num_workers = std::min<int64_t>(num_tasks, at::get_num_threads());
    std::atomic<int64_t> next{0};
    at::parallel_for(0, num_workers, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            auto worker = make_worker();
            for (int64_t task = next++; task < num_tasks; task = next++)
                worker(task);
        }
    });
}

}  // namespace moetrain
