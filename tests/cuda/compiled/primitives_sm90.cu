// Compiles what no kernel uses yet, and the emulated tests' user of named barriers.
// Gate: 232 registers; BAR.
#include "../emulated/kernels/ping_pong.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/shared.h"
#include "cuda/ptx/tma.h"
#include "cuda/ptx/wgmma.h"

namespace moetrain::test {

template <int kTileN, Major kMajorA, Major kMajorB>
__global__ void __launch_bounds__(128, 1) product_kernel(float* out, uint64_t a_descriptor, uint64_t b_descriptor) {
    float sums[kTileN / 2];
    ptx::wgmma_fence();
    ptx::wgmma<kTileN, kMajorA, kMajorB>(sums, a_descriptor, b_descriptor, false);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>(sums);
#pragma unroll
    for (int i = 0; i < kTileN / 2; ++i)
        out[i * 128 + ptx::thread_idx()] = sums[i];
    ptx::sync_block();
}

template __global__ void product_kernel<32, Major::kK, Major::kMn>(float*, uint64_t, uint64_t);
template __global__ void product_kernel<96, Major::kMn, Major::kK>(float*, uint64_t, uint64_t);
template __global__ void product_kernel<160, Major::kMn, Major::kMn>(float*, uint64_t, uint64_t);
template __global__ void product_kernel<224, Major::kK, Major::kMn>(float*, uint64_t, uint64_t);
template __global__ void product_kernel<256, Major::kMn, Major::kMn>(float*, uint64_t, uint64_t);

__global__ void bulk_copies_kernel(float* global, int num_bytes) {
    uint8_t* shared = ptx::dynamic_shared_memory();
    auto* barrier = reinterpret_cast<uint64_t*>(shared + num_bytes);
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_expect_bytes(barrier, num_bytes);
    ptx::bulk_load(shared, global, num_bytes, barrier);
    ptx::mbarrier_arrive(barrier);
    ptx::mbarrier_wait(barrier, 0);
    ptx::store_shared_16_bytes(shared, ptx::load_shared_16_bytes(shared + 16));
    ptx::store_shared_4_bytes(shared, ptx::lanes_where(ptx::shuffle(ptx::thread_idx(), 3) == 3));
    uint32_t words[4];
    ptx::ldmatrix_x4<true>(words, shared);
    ptx::stmatrix_x4<true>(shared, words);
    ptx::fence_async_proxy();
    ptx::sync_block();
    ptx::bulk_store(global, shared, num_bytes);
    ptx::bulk_commit();
    ptx::bulk_wait<0>();
}

}  // namespace moetrain::test
