// Flat chunks copied or summed by a table. Memory bound: reads each source once, writes each destination once.
// Compiles for sm_80 and later with CUDA 12 and 13.
// Gate: 64 registers; LDG STG.
#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cuda/chunks/chunks.h"
#include "cuda/common/warp.cuh"

namespace moetrain {
namespace {

constexpr int kThreadsPerBlock = 256;
constexpr int kBlocksOfSums = 4;  // on a multiprocessor: left to itself, ptxas takes 48 registers and spills
constexpr int64_t kVecBytes = 16;
constexpr int64_t kVecsPerThread = 4;  // where chunks are equally long
constexpr int64_t kMaxRowsOfGrid = 65535;

// As many elements as one load or store of the wider type takes: more would cost registers.
template <typename From, typename To>
constexpr int64_t kLanes = kVecBytes / static_cast<int64_t>(std::max(sizeof(From), sizeof(To)));

template <typename T>
__device__ __forceinline__ bool is_aligned(const T* x) {
    return reinterpret_cast<uintptr_t>(x) % kVecBytes == 0;
}

// What loads and stores so many bytes at once.
template <int64_t kNumBytes>
using Word = std::conditional_t<kNumBytes == 16, int4, std::conditional_t<kNumBytes == 8, int64_t, int32_t>>;

template <typename T, int64_t kSize>
__device__ __forceinline__ void load_vec(const T* from, T (&to)[kSize]) {
    const auto word = *reinterpret_cast<const Word<sizeof(to)>*>(from);
    memcpy(to, &word, sizeof(to));
}

template <typename T, int64_t kSize>
__device__ __forceinline__ void store_vec(const T (&from)[kSize], T* to) {
    Word<sizeof(from)> word;
    memcpy(&word, from, sizeof(from));
    *reinterpret_cast<Word<sizeof(from)>*>(to) = word;
}

template <typename To, typename From>
__device__ __forceinline__ To converted(const From& x) {
    if constexpr (std::is_same_v<From, To>) {
        return x;
    } else if constexpr (std::is_same_v<To, double>) {
        return load_as<double>(&x, 0);
    } else {
        return static_cast<To>(load_as<float>(&x, 0));
    }
}

// How many elements come one by one until `to` may be written 16 bytes at a time; all, where `from` then may not be
// read so.
template <typename From, typename To>
__device__ __forceinline__ int64_t unaligned_head(const From* from, const To* to, int64_t length) {
    for (int64_t head = 0; head < kVecBytes / static_cast<int64_t>(sizeof(To)) && head < length; ++head)
        if (is_aligned(to + head)) return is_aligned(from + head) ? head : length;
    return length;
}

template <typename From, typename To>
__global__ void __launch_bounds__(kThreadsPerBlock)
    copy_chunks_kernel(const From* __restrict__ source, const int64_t* __restrict__ table, int64_t num_rows,
                       To* __restrict__ target) {
    constexpr int64_t kSize = kLanes<From, To>;
    const int64_t first = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
    const int64_t step = gridDim.x * static_cast<int64_t>(blockDim.x);
    for (int64_t n = blockIdx.y; n < num_rows; n += gridDim.y) {
        const From* from = source + table[3 * n];
        To* to = target + table[3 * n + 1];
        const int64_t length = table[3 * n + 2];
        const int64_t head = unaligned_head(from, to, length);
        const int64_t num_vecs = (length - head) / kSize;
        for (int64_t v = first; v < num_vecs; v += step) {
            From x[kSize];
            To y[kSize];
            load_vec(from + head + v * kSize, x);
#pragma unroll
            for (int64_t i = 0; i < kSize; ++i)
                y[i] = converted<To>(x[i]);
            store_vec(y, to + head + v * kSize);
        }
        for (int64_t i = first; i < head; i += step)
            to[i] = converted<To>(from[i]);
        for (int64_t i = head + num_vecs * kSize + first; i < length; i += step)
            to[i] = converted<To>(from[i]);
    }
}

// Row n begins a sum; the rows after it with the same destination and length are its further terms.
__device__ __forceinline__ bool adds_to_previous(const int64_t* table, int64_t n) {
    return table[4 * n + 2] == table[4 * n - 2] && table[4 * n + 3] == table[4 * n - 1];
}

template <typename From>
__device__ __forceinline__ const From* source_of(const ChunkSources& sources, const int64_t* row) {
    return static_cast<const From*>(sources.data[row[0]]) + row[1];
}

template <typename From, typename To>
__global__ void __launch_bounds__(kThreadsPerBlock, kBlocksOfSums)
    sum_chunks_kernel(const __grid_constant__ ChunkSources sources, const int64_t* __restrict__ table, int64_t num_rows,
                      To* __restrict__ target) {
    constexpr bool kWide = std::is_same_v<From, double> || std::is_same_v<To, double>;
    using Acc = std::conditional_t<kWide, double, float>;
    constexpr int64_t kSize = kLanes<From, To>;
    const int64_t first = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
    const int64_t step = gridDim.x * static_cast<int64_t>(blockDim.x);
    for (int64_t n = blockIdx.y; n < num_rows; n += gridDim.y) {
        if (n > 0 && adds_to_previous(table, n)) continue;
        To* to = target + table[4 * n + 2];
        const int64_t length = table[4 * n + 3];
        int64_t end = n + 1;
        while (end < num_rows && adds_to_previous(table, end))
            ++end;
        int64_t head = unaligned_head(source_of<From>(sources, table + 4 * n), to, length);
        for (int64_t m = n + 1; m < end; ++m)
            if (unaligned_head(source_of<From>(sources, table + 4 * m), to, length) != head) head = length;
        const int64_t num_vecs = (length - head) / kSize;
        for (int64_t v = first; v < num_vecs; v += step) {
            const int64_t at = head + v * kSize;
            From x[kSize];
            Acc sum[kSize];
            To y[kSize];
            load_vec(source_of<From>(sources, table + 4 * n) + at, x);
#pragma unroll
            for (int64_t i = 0; i < kSize; ++i)
                sum[i] = converted<Acc>(x[i]);
            for (int64_t m = n + 1; m < end; ++m) {
                load_vec(source_of<From>(sources, table + 4 * m) + at, x);
#pragma unroll
                for (int64_t i = 0; i < kSize; ++i)
                    sum[i] += converted<Acc>(x[i]);
            }
#pragma unroll
            for (int64_t i = 0; i < kSize; ++i)
                y[i] = converted<To>(sum[i]);
            store_vec(y, to + at);
        }
        const auto sum_one = [&](int64_t i) {
            Acc sum = converted<Acc>(source_of<From>(sources, table + 4 * n)[i]);
            for (int64_t m = n + 1; m < end; ++m)
                sum += converted<Acc>(source_of<From>(sources, table + 4 * m)[i]);
            to[i] = converted<To>(sum);
        };
        for (int64_t i = first; i < head; i += step)
            sum_one(i);
        for (int64_t i = head + num_vecs * kSize + first; i < length; i += step)
            sum_one(i);
    }
}

// Lengths are known to the device alone: enough blocks per row for chunks of equal length, and all rows at once.
dim3 grid_of(int64_t num_rows, int64_t target_numel, int64_t lanes) {
    const int64_t per_block = kThreadsPerBlock * kVecsPerThread * lanes;
    const int64_t per_row = (target_numel / num_rows + per_block - 1) / per_block;
    return dim3(static_cast<unsigned>(std::clamp<int64_t>(per_row, 1, kMaxBlocks)),
                static_cast<unsigned>(std::min(num_rows, kMaxRowsOfGrid)));
}

template <typename Work>
cudaError_t with_type(Element dtype, const Work& work) {
    switch (dtype) {
        case Element::kBFloat16:
            return work(__nv_bfloat16{});
        case Element::kHalf:
            return work(__half{});
        case Element::kDouble:
            return work(double{});
        default:
            return work(float{});
    }
}

// Calls work(From{}, To{}) with zeros of the two types.
template <typename Work>
cudaError_t with_types(Element from_dtype, Element to_dtype, const Work& work) {
    return with_type(from_dtype,
                     [&](auto from) { return with_type(to_dtype, [&](auto to) { return work(from, to); }); });
}

}  // namespace

cudaError_t launch_copy_chunks(const void* source, Element source_dtype, const int64_t* table, int64_t num_rows,
                               void* target, Element target_dtype, int64_t target_numel, cudaStream_t stream) {
    if (num_rows == 0 || target_numel == 0) return cudaSuccess;
    return with_types(source_dtype, target_dtype, [&](auto from, auto to) {
        using From = decltype(from);
        using To = decltype(to);
        const dim3 grid = grid_of(num_rows, target_numel, kLanes<From, To>);
        copy_chunks_kernel<From, To><<<grid, kThreadsPerBlock, 0, stream>>>(static_cast<const From*>(source), table,
                                                                            num_rows, static_cast<To*>(target));
        return cudaGetLastError();
    });
}

cudaError_t launch_sum_chunks(const ChunkSources& sources, Element source_dtype, const int64_t* table, int64_t num_rows,
                              void* target, Element target_dtype, int64_t target_numel, cudaStream_t stream) {
    if (num_rows == 0 || target_numel == 0) return cudaSuccess;
    return with_types(source_dtype, target_dtype, [&](auto from, auto to) {
        using From = decltype(from);
        using To = decltype(to);
        const dim3 grid = grid_of(num_rows, target_numel, kLanes<From, To>);
        auto* sums = static_cast<To*>(target);
        sum_chunks_kernel<From, To><<<grid, kThreadsPerBlock, 0, stream>>>(sources, table, num_rows, sums);
        return cudaGetLastError();
    });
}

}  // namespace moetrain
