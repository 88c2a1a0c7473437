#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/chunks/chunks.h"
#include "ops/chunks/chunks.h"
#include "ops/common/boxed.h"
#include "ops/common/cuda.h"

namespace moetrain {
namespace {

static_assert(kMaxSources == kMaxChunkSources);

void copy_chunks(const char* op, const at::Tensor& source, const at::Tensor& table_N3, at::Tensor& target) {
    if (debug_checks()) check_copy_values(op, table_N3.cpu(), source.numel(), target.numel());
    C10_CUDA_CHECK(launch_copy_chunks(source.const_data_ptr(), element_of(source.scalar_type()),
                                      table_N3.const_data_ptr<int64_t>(), table_N3.size(0), target.mutable_data_ptr(),
                                      element_of(target.scalar_type()), target.numel(),
                                      c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

at::Tensor pack_chunks_cuda(const at::Tensor& source, const at::Tensor& table_N3, int64_t size, at::ScalarType dtype) {
    check_pack_chunks(source, table_N3, size, dtype);
    const c10::cuda::CUDAGuard guard(source.device());
    auto packed = at::empty({size}, source.options().dtype(dtype));
    copy_chunks("pack_chunks", source, table_N3, packed);
    return packed;
}

void unpack_chunks_cuda(at::Tensor& target, const at::Tensor& source, const at::Tensor& table_N3) {
    check_unpack_chunks(target, source, table_N3);
    const c10::cuda::CUDAGuard guard(target.device());
    copy_chunks("unpack_chunks_", source, table_N3, target);
}

void add_sources_cuda(at::Tensor& target, at::TensorList sources, const at::Tensor& table_N4) {
    check_add_sources(target, sources, table_N4);
    const c10::cuda::CUDAGuard guard(target.device());
    if (debug_checks()) check_sum_values(sources, table_N4.cpu(), target.numel());
    ChunkSources data{};
    for (size_t i = 0; i < sources.size(); ++i)
        data.data[i] = sources[i].const_data_ptr();
    C10_CUDA_CHECK(launch_sum_chunks(data, element_of(sources[0].scalar_type()), table_N4.const_data_ptr<int64_t>(),
                                     table_N4.size(0), target.mutable_data_ptr(), element_of(target.scalar_type()),
                                     target.numel(), c10::cuda::getCurrentCUDAStream()));
}

TORCH_LIBRARY_IMPL(moetrain, CUDA, m) {
    m.impl("pack_chunks", boxed::kernel<&pack_chunks_cuda>());
    m.impl("unpack_chunks_", boxed::kernel<&unpack_chunks_cuda>());
    m.impl("add_sources_", boxed::kernel<&add_sources_cuda>());
}

}  // namespace moetrain
