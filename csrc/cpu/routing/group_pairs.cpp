// Stable counting sort. Each thread owns one run of consecutive pairs: it counts them, a scan over (expert, run)
// gives every run its first place in every expert, and the thread writes its pairs in order. So the result is the
// stable one for any number of runs.
//
// Three experts, eight pairs in two runs; the last bucket is for -1:
//
//     expert of pair   2 0 -1 2 | 0 2 1 0
//     bucket           0   1   2  -1
//     count, run 0     1   0   2   1
//     count, run 1     2   1   1   0
//     place, run 0     0   3   4   7    bucket by bucket, and run by run inside one: what stands before
//     place, run 1     1   3   6   8
//     offset           0   3   4   7    run 0's places
//     pair             1 4 7 | 6 | 0 3 5 | 2
#include "cpu/routing/group_pairs.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

namespace moetrain {
namespace {

constexpr int64_t kPairsPerRun = 8192;  // fewer are not worth a thread

// Counts into buckets 0..num_experts, the last for -1; returns the first bad position or -1.
int64_t count_run(const int32_t* expert_id, int64_t begin, int64_t end, int64_t num_experts, int32_t* bucket) {
    for (int64_t i = begin; i < end; ++i) {
        const int64_t id = expert_id[i];
        if (id < -1 || id >= num_experts) return i;
        ++bucket[id < 0 ? num_experts : id];
    }
    return -1;
}

// Turns counts [run][bucket] into first places, and fills the experts' offsets.
void scan_counts(std::vector<int32_t>& count, int64_t num_runs, int64_t num_experts, int32_t* offset) {
    const int64_t num_buckets = num_experts + 1;
    int32_t place = 0;
    for (int64_t b = 0; b < num_buckets; ++b) {
        offset[b] = place;
        for (int64_t run = 0; run < num_runs; ++run) {
            const int32_t size = count[run * num_buckets + b];
            count[run * num_buckets + b] = place;
            place += size;
        }
    }
}

}  // namespace

int64_t group_pairs_kernel(const int32_t* expert_id, int64_t num_pairs, int64_t num_experts, int32_t* pair,
                           int32_t* offset) {
    const int64_t num_buckets = num_experts + 1;
    const int64_t wanted = (num_pairs + kPairsPerRun - 1) / kPairsPerRun;
    const int64_t num_runs = std::clamp<int64_t>(wanted, 1, at::get_num_threads());
    const auto first = [&](int64_t run) { return num_pairs * run / num_runs; };

    std::vector<int32_t> count(num_runs * num_buckets, 0);
    std::vector<int64_t> breach(num_runs, -1);
    at::parallel_for(0, num_runs, 1, [&](int64_t begin, int64_t end) {
        for (int64_t run = begin; run < end; ++run) {
            breach[run] =
                count_run(expert_id, first(run), first(run + 1), num_experts, count.data() + run * num_buckets);
        }
    });
    const auto bad = std::find_if(breach.begin(), breach.end(), [](int64_t position) { return position >= 0; });
    if (bad != breach.end()) return *bad;

    scan_counts(count, num_runs, num_experts, offset);
    at::parallel_for(0, num_runs, 1, [&](int64_t begin, int64_t end) {
        for (int64_t run = begin; run < end; ++run) {
            int32_t* place = count.data() + run * num_buckets;
            for (int64_t i = first(run); i < first(run + 1); ++i) {
                const int64_t bucket = expert_id[i] < 0 ? num_experts : expert_id[i];
                pair[place[bucket]++] = static_cast<int32_t>(i);
            }
        }
    });
    return -1;
}

}  // namespace moetrain
