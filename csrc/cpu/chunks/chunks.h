// Copies and sums of flat chunks, by the dtypes of what is read and what is written.
#pragma once
#include <c10/core/ScalarType.h>

#include <cstdint>

namespace moetrain {

struct ChunkKernels {
    int64_t from_bytes, to_bytes;  // of an element
    void (*copy)(const void* from, int64_t size, void* to);
    void (*sum)(const void* const* data, const int64_t* rows, int64_t num_rows, int64_t start, int64_t size, void* to);
};

ChunkKernels chunk_kernels(at::ScalarType from, at::ScalarType to);

}  // namespace moetrain
