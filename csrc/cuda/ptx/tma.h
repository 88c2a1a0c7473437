// TMA: one thread copies a box of a global tensor into shared memory or back; a tensor map describes tensor, box and
// swizzle. PTX ISA, "Data Movement and Conversion Instructions: Tensor copy" (cp.async.bulk.tensor) and "Bulk copy"
// (cp.async.bulk). Shared addresses are multiples of 128 bytes (of 16 for the bulk copies without a tensor map).
//
// A load ends by taking its bytes off an mbarrier. Stores are gathered into groups of the issuing thread:
//   every thread that wrote:  store to shared memory, fence_async_proxy, then a barrier with the issuing thread
//   the issuing thread:       tma_store, bulk_commit; before shared memory is written again, bulk_wait_read
// A thread must not end before its stores have read shared memory.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/common/tensor_spec.h"
#include "cuda/ptx/launch.h"

namespace moetrain::ptx {

using TensorMap = CUtensorMap;

// Encodes on the host. The tensor map travels as a __grid_constant__ kernel parameter.
inline TensorMap make_tensor_map(const TensorSpec& unchecked) {
    void* entry_point = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry_point, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess)
        throw std::runtime_error("make_tensor_map: the driver has no cuTensorMapEncodeTiled; it needs CUDA 12.0");
    const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry_point);

    const TensorSpec spec = checked(unchecked);
    const auto size = [](int64_t x) { return static_cast<cuuint64_t>(x); };
    const cuuint64_t sizes[3] = {size(spec.num_columns), size(spec.num_rows), size(spec.num_slices)};
    const cuuint64_t stride_bytes[2] = {size(spec.row_stride) * sizeof(Bf16), size(spec.slice_stride) * sizeof(Bf16)};
    const cuuint32_t box[3] = {static_cast<cuuint32_t>(spec.box_columns), static_cast<cuuint32_t>(spec.box_rows), 1};
    const cuuint32_t element_strides[3] = {1, 1, 1};
    constexpr CUtensorMapSwizzle kModes[4] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                              CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
    TensorMap map;
    const CUresult result =
        encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<Bf16*>(spec.data), sizes, stride_bytes, box,
               element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, kModes[static_cast<int>(spec.swizzle)],
               CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        throw std::invalid_argument("make_tensor_map: the driver refuses tensor [" + std::to_string(spec.num_slices) +
                                    ", " + std::to_string(spec.num_rows) + ", " + std::to_string(spec.num_columns) +
                                    "], box [" + std::to_string(spec.box_rows) + ", " +
                                    std::to_string(spec.box_columns) + "]: error " + std::to_string(result));
    return map;
}

// "prefetch.tensormap": a hint; a kernel's first load then does not wait for the map.
__device__ __forceinline__ void prefetch_tensor_map(const TensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Copies the box at (slice, row, column) to `shared`, then takes its bytes off `barrier`. The whole box is written
// and counted, also where it reaches beyond the tensor.
__device__ __forceinline__ void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, int slice, int row,
                                         int column) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], "
        "[%5];" ::"r"(shared_address(shared)),
        "l"(map), "r"(column), "r"(row), "r"(slice), "r"(shared_address(barrier))
        : "memory");
}

// Copies `shared` to the box at (slice, row, column), as part of the thread's next bulk_commit. What lies beyond the
// tensor is not written.
__device__ __forceinline__ void tma_store(const TensorMap* map, const void* shared, int slice, int row, int column) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(map),
                 "r"(column), "r"(row), "r"(slice), "r"(shared_address(shared))
                 : "memory");
}

// Copies `num_bytes`, a multiple of 16, without a tensor map; then takes them off `barrier`.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, int num_bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(num_bytes), "r"(shared_address(barrier))
                 : "memory");
}

// Copies `num_bytes`, a multiple of 16, as part of the thread's next bulk_commit: the rows of a tile that ends early.
__device__ __forceinline__ void bulk_store(void* global, const void* shared, int num_bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
                 "r"(shared_address(shared)), "r"(num_bytes)
                 : "memory");
}

// "cp.async.bulk.commit_group": the stores since the last commit become a group of this thread.
__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// "cp.async.bulk.wait_group.read": waits until at most `kNumPending` of this thread's groups have yet to read shared
// memory. Other threads learn of it through a barrier.
template <int kNumPending>
__device__ __forceinline__ void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kNumPending) : "memory");
}

// "cp.async.bulk.wait_group": as bulk_wait_read, and what the groups wrote is visible to this thread.
template <int kNumPending>
__device__ __forceinline__ void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kNumPending) : "memory");
}

}  // namespace moetrain::ptx
