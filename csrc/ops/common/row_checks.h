#pragma once
// Checks shared by the ops that move rows or multiply groups of rows: each names the op, the argument, what must
// hold and what came. Index tensors are int32; a list's length is a capacity, its true length is offset[-1].
#include <algorithm>
#include <cstdint>

#include "ops/common/checks.h"

namespace moetrain {

inline void check_same_dtype(const char* op, const char* name, const at::Tensor& t, const char* like_name,
                             const at::Tensor& like) {
    TORCH_CHECK_TYPE(t.scalar_type() == like.scalar_type(), op, ": ", name, " must have the dtype of ", like_name, " (",
                     like.scalar_type(), "), got ", t.scalar_type(), "; convert one with .to()");
}

// Rows of a matrix, or of a stack of matrices: contiguous innermost, rows apart, any stride over slots.
inline void check_rows(const char* op, const char* name, const char* shape, const at::Tensor& t, int64_t dim) {
    TORCH_CHECK_VALUE(t.dim() == dim, op, ": ", name, " must be ", shape, ", got ", t.sizes());
    check_contiguous_rows(op, name, t);
    if (t.numel() == 0) return;
    TORCH_CHECK_VALUE(t.size(-2) == 1 || t.stride(-2) >= t.size(-1), op, ": rows of ", name,
                      " must not overlap, got sizes ", t.sizes(), " and strides ", t.strides(), "; call .contiguous()");
}

inline void check_index(const char* op, const char* name, const char* shape, const at::Tensor& t, const char* like_name,
                        const at::Tensor& like) {
    TORCH_CHECK_VALUE(t.dim() == 1, op, ": ", name, " must be ", shape, ", got ", t.sizes());
    check_dtype(op, name, t, at::kInt);
    check_contiguous(op, name, t);
    check_fits_int32(op, "a list's length", t.size(0));
    check_same_device(op, name, t, like_name, like);
}

inline void check_offset(const char* op, const at::Tensor& offset_E1, const char* like_name, const at::Tensor& like) {
    check_index(op, "offset", "[E + 1]", offset_E1, like_name, like);
    TORCH_CHECK_VALUE(offset_E1.size(0) >= 1, op, ": offset must have E + 1 >= 1 entries, got ", offset_E1.sizes());
}

// Elements from one row to the next; the innermost size where there is one row and its stride says nothing.
inline int64_t row_stride(const at::Tensor& t) {
    return t.size(-2) > 1 ? t.stride(-2) : std::max<int64_t>(t.size(-1), 1);
}

// The checks below read values, so `offset` and `ids` are on the CPU. Returns the true length of the list.
inline int64_t check_offset_values(const char* op, const at::Tensor& offset_E1, int64_t capacity) {
    const auto* offset = offset_E1.const_data_ptr<int32_t>();
    const int64_t num_groups = offset_E1.size(0) - 1;
    TORCH_CHECK_VALUE(offset[0] == 0, op, ": offset must start at 0, got offset[0] = ", offset[0],
                      "; pass a zero and then the cumulative sizes of the groups");
    for (int64_t e = 0; e < num_groups; ++e) {
        TORCH_CHECK_VALUE(offset[e] <= offset[e + 1], op, ": offset must not fall, got offset[", e, "] = ", offset[e],
                          " and offset[", e + 1, "] = ", offset[e + 1], "; pass cumulative sizes of the groups");
    }
    TORCH_CHECK_VALUE(offset[num_groups] <= capacity, op, ": offset[-1] is ", offset[num_groups],
                      ", beyond the list's capacity of ", capacity, "; pass the offset that belongs to the list");
    return offset[num_groups];
}

inline void check_id_values(const char* op, const char* name, const at::Tensor& ids, int64_t length, int64_t limit,
                            const char* what) {
    const auto* id = ids.const_data_ptr<int32_t>();
    bool inside = true;
    for (int64_t i = 0; i < length; ++i) {
        inside &= id[i] >= 0 && id[i] < limit;
    }
    if (inside) return;
    const auto* bad = std::find_if(id, id + length, [limit](int32_t v) { return v < 0 || v >= limit; });
    TORCH_CHECK_VALUE(false, op, ": ", name, "[", bad - id, "] is ", *bad, ", but ", what, " is ", limit,
                      "; ids must be at least 0 and below that");
}

}  // namespace moetrain
