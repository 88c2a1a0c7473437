// A small user of TMA in both directions, MN-major wgmma and stmatrix: out [I, J] = A [K, I]ᵀ · B [K, J], bf16, one
// warpgroup, one stage. Block b computes the 64 rows of `out` from 64·b on, one tile of columns after the other.
#pragma once

#include <cstdint>

#include "cuda/common/bf16.h"
#include "cuda/common/matrix_descriptor.h"
#include "cuda/common/tensor_spec.h"
#include "cuda/ptx/launch.h"
#include "cuda/ptx/math.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/shared.h"
#include "cuda/ptx/tma.h"
#include "cuda/ptx/wgmma.h"

namespace moetrain::test {

template <int kTileJ_, int kTileK_, Swizzle kSwizzle_>
struct TransposedGemmConfig {
    static constexpr int kTileI = 64;
    static constexpr int kTileJ = kTileJ_;
    static constexpr int kTileK = kTileK_;
    static constexpr Swizzle kSwizzle = kSwizzle_;
    static constexpr int kBlockElements = swizzle_row_bytes(kSwizzle) / 2;  // of I or J in one row of shared memory
    static constexpr int kNumThreads = 128;
};

template <class Config>
struct TransposedGemmStorage {
    alignas(1024) Bf16 a[Config::kTileK * Config::kTileI];
    alignas(1024) Bf16 b[Config::kTileK * Config::kTileJ];
    alignas(1024) Bf16 out[Config::kTileI * Config::kTileJ];  // blocks of 64 columns, Swizzle::k128
    alignas(8) uint64_t full_barrier;
};

struct TransposedGemmArguments {
    ptx::TensorMap a_map;    // [1, K, I], boxes [kTileK, kBlockElements]
    ptx::TensorMap b_map;    // [1, K, J], boxes [kTileK, kBlockElements]
    ptx::TensorMap out_map;  // [1, I, J], boxes [64, 64]
    int num_columns;         // J
    int depth;               // K
};

template <class Config>
TransposedGemmArguments make_transposed_gemm(const Bf16* a, const Bf16* b, Bf16* out, int num_rows, int num_columns,
                                             int depth) {
    const auto operand = [depth](const Bf16* data, int columns) {
        return ptx::make_tensor_map({.data = data,
                                     .num_rows = depth,
                                     .num_columns = columns,
                                     .box_rows = Config::kTileK,
                                     .box_columns = Config::kBlockElements,
                                     .swizzle = Config::kSwizzle});
    };
    return {operand(a, num_rows), operand(b, num_columns),
            ptx::make_tensor_map({.data = out,
                                  .num_rows = num_rows,
                                  .num_columns = num_columns,
                                  .box_rows = Config::kTileI,
                                  .box_columns = kSwizzleRowElements}),
            num_columns, depth};
}

template <class Config>
class TransposedGemmBlock {
 public:
    using Storage = TransposedGemmStorage<Config>;

    __device__ TransposedGemmBlock(const TransposedGemmArguments& arguments, Storage& storage)
        : arguments_(arguments), storage_(storage) {}

    __device__ void init_barrier() {
        if (ptx::thread_idx() == 0) {
            ptx::mbarrier_init(&storage_.full_barrier, 1);
            ptx::fence_mbarrier_init();
        }
        ptx::sync_block();
    }

    __device__ void multiply(float (&accumulators)[Config::kTileJ / 2], int row, int column) {
        for (int k = 0; k < arguments_.depth; k += Config::kTileK) {
            if (ptx::thread_idx() == 0) load(row, column, k);
            ptx::mbarrier_wait(&storage_.full_barrier, phase_);
            phase_ ^= 1;
            multiply_stage(accumulators, k > 0);
            ptx::wgmma_wait<0>(accumulators);
            ptx::sync_block();  // before the tiles are loaded again
        }
    }

    __device__ void store(const float (&accumulators)[Config::kTileJ / 2], int row, int column) {
        // The last tile's store may still be reading.
        if (ptx::thread_idx() == 0) ptx::bulk_wait_read<0>();
        ptx::sync_block();
        const int warp_idx = ptx::thread_idx() / 32;
        const int lane_idx = ptx::thread_idx() % 32;
        const int tile_row = 16 * warp_idx + lane_idx % 16;  // that this lane names, of matrices lane_idx / 8
#pragma unroll
        for (int octet = 0; octet < Config::kTileJ / 8; octet += 2) {
            uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                words[i] = ptx::pack_bf16x2(accumulators[4 * octet + 2 * i], accumulators[4 * octet + 2 * i + 1]);
            const int chunk_idx = octet + lane_idx / 16;
            uint8_t* block = reinterpret_cast<uint8_t*>(storage_.out + chunk_idx / 8 * 64 * Config::kTileI);
            ptx::stmatrix_x4(block + swizzled_chunk_offset(tile_row, chunk_idx % 8), words);
        }
        ptx::fence_async_proxy();
        ptx::sync_block();
        if (ptx::thread_idx() != 0) return;
        for (int block = 0; block < Config::kTileJ / 64; ++block)
            ptx::tma_store(&arguments_.out_map, storage_.out + block * 64 * Config::kTileI, 0, row,
                           column + 64 * block);
        ptx::bulk_commit();
    }

    __device__ void finish() {
        if (ptx::thread_idx() == 0) ptx::bulk_wait_read<0>();
    }

 private:
    static constexpr int kRowBytes = swizzle_row_bytes(Config::kSwizzle);
    static constexpr int kOperandBlockBytes = Config::kTileK * kRowBytes;

    __device__ void load(int row, int column, int k) {
        constexpr int kNumBytes = (Config::kTileI + Config::kTileJ) * Config::kTileK * 2;
        ptx::mbarrier_arrive_expect_bytes(&storage_.full_barrier, kNumBytes);
        for (int i = 0; i < Config::kTileI; i += Config::kBlockElements)
            ptx::tma_load(storage_.a + i * Config::kTileK, &arguments_.a_map, &storage_.full_barrier, 0, k, row + i);
        for (int j = 0; j < Config::kTileJ; j += Config::kBlockElements)
            ptx::tma_load(storage_.b + j * Config::kTileK, &arguments_.b_map, &storage_.full_barrier, 0, k, column + j);
    }

    __device__ void multiply_stage(float (&accumulators)[Config::kTileJ / 2], bool accumulate) {
        constexpr int kStepBytes = 16 * kRowBytes;  // a step of 16 along K: two atoms
        const uint32_t a_address = ptx::shared_address(storage_.a);
        const uint32_t b_address = ptx::shared_address(storage_.b);
        ptx::wgmma_fence();
#pragma unroll
        for (int step = 0; step < Config::kTileK / 16; ++step)
            ptx::wgmma<Config::kTileJ, Major::kMn, Major::kMn>(
                accumulators,
                make_mn_major_descriptor<Config::kSwizzle>(a_address + step * kStepBytes, kOperandBlockBytes),
                make_mn_major_descriptor<Config::kSwizzle>(b_address + step * kStepBytes, kOperandBlockBytes),
                accumulate || step > 0);
        ptx::wgmma_commit();
    }

    const TransposedGemmArguments& arguments_;
    Storage& storage_;
    uint32_t phase_ = 0;
};

template <class Config>
__global__ void __launch_bounds__(Config::kNumThreads, 1)
    transposed_gemm_kernel(const __grid_constant__ TransposedGemmArguments arguments) {
    auto& storage = *reinterpret_cast<TransposedGemmStorage<Config>*>(ptx::dynamic_shared_memory());
    TransposedGemmBlock<Config> block(arguments, storage);
    block.init_barrier();
    const int row = Config::kTileI * ptx::block_idx();
    for (int column = 0; column < arguments.num_columns; column += Config::kTileJ) {
        float accumulators[Config::kTileJ / 2];
        block.multiply(accumulators, row, column);
        block.store(accumulators, row, column);
    }
    block.finish();
}

}  // namespace moetrain::test
