// TMA: one thread copies a box of a global tensor into shared memory; a tensor map describes tensor, box and swizzle.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/common/bf16.h"
#include "cuda/ptx/launch.h"

namespace moetrain::ptx {

using TensorMap = CUtensorMap;

// A contiguous bf16 tensor [num_slices, num_rows, num_columns], copied in boxes [1, box_rows, box_columns] with
// 128-byte swizzle; what lies outside the tensor reads as zero.
inline TensorMap make_tensor_map(const Bf16* data, int64_t num_slices, int64_t num_rows, int64_t num_columns,
                                 int box_rows, int box_columns) {
    void* entry_point = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry_point, 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess || found != cudaDriverEntryPointSuccess)
        throw std::runtime_error("make_tensor_map: the driver has no cuTensorMapEncodeTiled; it needs CUDA 12.0");
    const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry_point);

    const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(num_columns), static_cast<cuuint64_t>(num_rows),
                                 static_cast<cuuint64_t>(num_slices)};
    const cuuint64_t stride_bytes[2] = {sizes[0] * sizeof(Bf16), sizes[0] * sizes[1] * sizeof(Bf16)};
    const cuuint32_t box[3] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows), 1};
    const cuuint32_t element_strides[3] = {1, 1, 1};
    TensorMap map;
    const CUresult result =
        encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<Bf16*>(data), sizes, stride_bytes, box,
               element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS)
        throw std::invalid_argument("make_tensor_map: tensor [" + std::to_string(num_slices) + ", " +
                                    std::to_string(num_rows) + ", " + std::to_string(num_columns) + "], box [" +
                                    std::to_string(box_rows) + ", " + std::to_string(box_columns) +
                                    "] rejected by the driver; address and row must be multiples of 16 bytes");
    return map;
}

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

}  // namespace moetrain::ptx
