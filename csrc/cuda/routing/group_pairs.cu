// Stable counting sort by expert, in four kernels and without atomics on positions. A warp owns a run of
// consecutive pairs: it counts them; a scan over runs within each expert and a scan over experts give every run its
// first place in every expert; the warp then places its pairs 32 at a time, in order. Memory bound: ids are read
// twice, what is said of each pair is written once. Compiled for sm_80 and sm_90a.
// Gate: 40 registers; LDG LDS STG STS.
#include <algorithm>

#include "cuda/common/warp.cuh"
#include "cuda/routing/group_pairs.h"

namespace moetrain {
namespace {

constexpr int64_t kPairsPerRun = 1024;
constexpr int kScanThreads = 256;
constexpr int64_t kPrivateCounterBytes = 12 << 10;  // up to here four warps share a block

int64_t num_runs_of(int64_t num_pairs) { return (num_pairs + kPairsPerRun - 1) / kPairsPerRun; }

__device__ __forceinline__ int64_t bucket_of(int32_t id, int64_t num_experts) {
    return id >= 0 && id < num_experts ? id : num_experts;
}

// Exclusive prefix sum over a block's threads; `total` gets the sum. Uses kScanThreads ints of shared memory.
__device__ __forceinline__ int32_t block_scan(int32_t x, int32_t* shared, int32_t* total) {
    const int i = threadIdx.x;
    shared[i] = x;
    __syncthreads();
    for (int step = 1; step < kScanThreads; step *= 2) {
        const int32_t before = i >= step ? shared[i - step] : 0;
        __syncthreads();
        shared[i] += before;
        __syncthreads();
    }
    *total = shared[kScanThreads - 1];
    const int32_t exclusive = shared[i] - x;
    __syncthreads();
    return exclusive;
}

// count[run][bucket]; bucket num_experts takes the tail.
__global__ void count_kernel(const int32_t* __restrict__ expert_id, int64_t num_pairs, int64_t num_experts,
                             int64_t num_runs, int32_t* __restrict__ count, int64_t* breach) {
    extern __shared__ int32_t shared_counter[];
    const int lane = threadIdx.x % kWarpSize;
    const int64_t num_buckets = num_experts + 1;
    const int64_t run = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
    if (run >= num_runs) return;
    int32_t* counter = shared_counter + threadIdx.x / kWarpSize * num_buckets;
    for (int64_t b = lane; b < num_buckets; b += kWarpSize)
        counter[b] = 0;
    __syncwarp();
    const int64_t end = min((run + 1) * kPairsPerRun, num_pairs);
    for (int64_t i = run * kPairsPerRun + lane; i < end; i += kWarpSize) {
        const int32_t id = expert_id[i];
        atomicAdd(counter + bucket_of(id, num_experts), 1);
        if (breach != nullptr && (id < -1 || id >= num_experts)) {
            atomicMin(reinterpret_cast<unsigned long long*>(breach), static_cast<unsigned long long>(i));
        }
    }
    __syncwarp();
    for (int64_t b = lane; b < num_buckets; b += kWarpSize)
        count[run * num_buckets + b] = counter[b];
}

// One block per bucket: counts become places within the bucket; total[bucket] is its size.
__global__ void __launch_bounds__(kScanThreads)
    scan_runs_kernel(int32_t* __restrict__ count, int64_t num_runs, int64_t num_buckets, int32_t* __restrict__ total) {
    __shared__ int32_t shared[kScanThreads];
    const int64_t bucket = blockIdx.x;
    int32_t before = 0;
    for (int64_t first = 0; first < num_runs; first += kScanThreads) {
        const int64_t run = first + threadIdx.x;
        int32_t* cell = count + run * num_buckets + bucket;
        const int32_t size = run < num_runs ? *cell : 0;
        int32_t sum = 0;
        const int32_t place = before + block_scan(size, shared, &sum);
        if (run < num_runs) *cell = place;
        before += sum;
    }
    if (threadIdx.x == 0) total[bucket] = before;
}

// One block: sizes of buckets become offsets; the tail's offset is the number of grouped pairs.
__global__ void __launch_bounds__(kScanThreads)
    scan_buckets_kernel(const int32_t* __restrict__ total, int64_t num_buckets, int32_t* __restrict__ offset) {
    __shared__ int32_t shared[kScanThreads];
    int32_t before = 0;
    for (int64_t first = 0; first < num_buckets; first += kScanThreads) {
        const int64_t b = first + threadIdx.x;
        int32_t sum = 0;
        const int32_t place = before + block_scan(b < num_buckets ? total[b] : 0, shared, &sum);
        if (b < num_buckets) offset[b] = place;
        before += sum;
    }
}

// What is written of pair i, which became the n-th.
struct PairWriter {
    int32_t* __restrict__ pair;

    __device__ __forceinline__ void operator()(int32_t n, int64_t i) const { pair[n] = static_cast<int32_t>(i); }
};

template <typename Acc>
struct ChoiceWriter {
    GroupedChoices<Acc> to;

    __device__ __forceinline__ void operator()(int32_t n, int64_t i) const {
        to.token_N[n] = static_cast<int32_t>(i) / to.top_k;
        to.weight_N[n] = to.weight_TK[i];
        to.place_TK[i] = n;
    }
};

template <typename Writer>
__global__ void place_kernel(const int32_t* __restrict__ expert_id, int64_t num_pairs, int64_t num_experts,
                             int64_t num_runs, const int32_t* __restrict__ count, const int32_t* __restrict__ offset,
                             const Writer write) {
    extern __shared__ int32_t shared_counter[];
    const int lane = threadIdx.x % kWarpSize;
    const int64_t num_buckets = num_experts + 1;
    const int64_t run = static_cast<int64_t>(blockIdx.x) * (blockDim.x / kWarpSize) + threadIdx.x / kWarpSize;
    if (run >= num_runs) return;
    int32_t* next = shared_counter + threadIdx.x / kWarpSize * num_buckets;
    for (int64_t b = lane; b < num_buckets; b += kWarpSize)
        next[b] = offset[b] + count[run * num_buckets + b];
    __syncwarp();
    const int64_t begin = run * kPairsPerRun;
    const int64_t end = min(begin + kPairsPerRun, num_pairs);
    for (int64_t first = begin; first < end; first += kWarpSize) {
        const int64_t i = first + lane;
        const bool inside = i < end;
        const int bucket = inside ? static_cast<int>(bucket_of(expert_id[i], num_experts)) : -1;
        const unsigned peers = __match_any_sync(kWholeWarp, bucket);  // lanes with the same bucket
        const int rank = __popc(peers & ((1U << lane) - 1));
        if (inside) write(next[bucket] + rank, i);
        __syncwarp();
        if (inside && rank == 0) next[bucket] += __popc(peers);
        __syncwarp();
    }
}

template <typename Writer>
cudaError_t launch_with(const Writer& write, const int32_t* expert_id, int64_t num_pairs, int64_t num_experts,
                        int32_t* offset, int32_t* scratch, int64_t* breach, cudaStream_t stream) {
    const int64_t num_buckets = num_experts + 1;
    if (num_pairs == 0) return cudaMemsetAsync(offset, 0, num_buckets * sizeof(int32_t), stream);
    const int64_t num_runs = num_runs_of(num_pairs);
    const int64_t counter_bytes = num_buckets * static_cast<int64_t>(sizeof(int32_t));
    const int64_t warps = counter_bytes <= kPrivateCounterBytes ? 4 : 1;
    const auto blocks = static_cast<unsigned>((num_runs + warps - 1) / warps);
    const auto threads = static_cast<unsigned>(warps * kWarpSize);
    const auto shared_bytes = static_cast<size_t>(warps * counter_bytes);
    int32_t* total = scratch + num_runs * num_buckets;

    count_kernel<<<blocks, threads, shared_bytes, stream>>>(expert_id, num_pairs, num_experts, num_runs, scratch,
                                                            breach);
    scan_runs_kernel<<<static_cast<unsigned>(num_buckets), kScanThreads, 0, stream>>>(scratch, num_runs, num_buckets,
                                                                                      total);
    scan_buckets_kernel<<<1, kScanThreads, 0, stream>>>(total, num_buckets, offset);
    place_kernel<Writer><<<blocks, threads, shared_bytes, stream>>>(expert_id, num_pairs, num_experts, num_runs,
                                                                    scratch, offset, write);
    return cudaGetLastError();
}

}  // namespace

int64_t group_pairs_scratch_size(int64_t num_pairs, int64_t num_experts) {
    return (num_runs_of(num_pairs) + 1) * (num_experts + 1);  // count and total
}

cudaError_t launch_group_pairs(const int32_t* expert_id, int64_t num_pairs, int64_t num_experts, int32_t* pair,
                               int32_t* offset, int32_t* scratch, int64_t* breach, cudaStream_t stream) {
    return launch_with(PairWriter{pair}, expert_id, num_pairs, num_experts, offset, scratch, breach, stream);
}

template <typename Acc>
cudaError_t launch_group_choices(const int32_t* expert_id_TK, int64_t num_pairs, int64_t num_experts,
                                 const GroupedChoices<Acc>& to, int32_t* offset, int32_t* scratch,
                                 cudaStream_t stream) {
    return launch_with(ChoiceWriter<Acc>{to}, expert_id_TK, num_pairs, num_experts, offset, scratch, nullptr, stream);
}

template cudaError_t launch_group_choices(const int32_t*, int64_t, int64_t, const GroupedChoices<float>&, int32_t*,
                                          int32_t*, cudaStream_t);
template cudaError_t launch_group_choices(const int32_t*, int64_t, int64_t, const GroupedChoices<double>&, int32_t*,
                                          int32_t*, cudaStream_t);

}  // namespace moetrain
