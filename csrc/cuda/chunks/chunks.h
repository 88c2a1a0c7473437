#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/common/launch.h"

namespace moetrain {

constexpr int kMaxChunkSources = 16;

struct ChunkSources {
    const void* data[kMaxChunkSources];
};

// For each row (from, to, length) of the table: target[to + i] = source[from + i], converted, for i < length.
// One launch for the whole table, which only the device reads. The caller vouches for its values; destinations do not
// overlap, so that `target_numel` bounds the sum of lengths.
cudaError_t launch_copy_chunks(const void* source, Element source_dtype, const int64_t* table, int64_t num_rows,
                               void* target, Element target_dtype, int64_t target_numel, cudaStream_t stream);

// The same for rows (which source, from, to, length): neighbouring rows of one `to` and `length` are summed, first to
// last, in at least float32, and rounded once.
cudaError_t launch_sum_chunks(const ChunkSources& sources, Element source_dtype, const int64_t* table, int64_t num_rows,
                              void* target, Element target_dtype, int64_t target_numel, cudaStream_t stream);

}  // namespace moetrain
