#pragma once
#include <cstdint>
#include <cstring>

namespace moetrain {

// dst[i, :] = src[row[i], :] for i < num_rows, on the calling thread; dst is contiguous, a row is `row_bytes` bytes.
inline void copy_rows(const void* src, int64_t src_stride_bytes, const int32_t* row, int64_t num_rows, void* dst,
                      int64_t row_bytes) {
    if (row_bytes == 0) return;  // memcpy must not be given the null pointers of empty tensors, even to copy nothing
    const auto* from = static_cast<const char*>(src);
    auto* to = static_cast<char*>(dst);
    for (int64_t i = 0; i < num_rows; ++i) {
        std::memcpy(to + i * row_bytes, from + row[i] * src_stride_bytes, static_cast<size_t>(row_bytes));
    }
}

}  // namespace moetrain
