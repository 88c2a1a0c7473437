// What a TMA tensor map describes.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda/common/bf16.h"
#include "cuda/common/matrix_descriptor.h"

namespace moetrain {

// A bf16 tensor [num_slices, num_rows, num_columns] with contiguous columns, copied in boxes [1, box_rows,
// box_columns]. Loads read what lies outside as zero, stores do not write it.
struct TensorSpec {
    const Bf16* data;
    int64_t num_slices = 1;
    int64_t num_rows;
    int64_t num_columns;
    int64_t row_stride = 0;    // elements from row to row; 0: rows without gaps
    int64_t slice_stride = 0;  // elements from slice to slice; 0: slices without gaps
    int box_rows;
    int box_columns;
    Swizzle swizzle = Swizzle::k128;
};

// Fills in the strides; throws std::invalid_argument for what cuTensorMapEncodeTiled refuses, or what this layer does
// not support: a swizzled box whose row is not exactly the swizzle's width.
inline TensorSpec checked(TensorSpec spec) {
    const auto require = [](bool holds, const std::string& what) {
        if (!holds) throw std::invalid_argument("make_tensor_map: " + what);
    };
    if (spec.row_stride == 0) spec.row_stride = spec.num_columns;
    if (spec.slice_stride == 0) spec.slice_stride = spec.num_rows * spec.row_stride;
    require(spec.num_slices >= 1 && spec.num_rows >= 1 && spec.num_columns >= 1, "every size must be at least 1");
    require(reinterpret_cast<uintptr_t>(spec.data) % 16 == 0 && spec.row_stride % 8 == 0 && spec.slice_stride % 8 == 0,
            "address and strides must be multiples of 16 bytes");
    require(spec.box_rows >= 1 && spec.box_rows <= 256 && spec.box_columns >= 1 && spec.box_columns <= 256,
            "a box has 1 to 256 rows and columns; got [" + std::to_string(spec.box_rows) + ", " +
                std::to_string(spec.box_columns) + "]");
    const int row_bytes = 2 * spec.box_columns;
    if (spec.swizzle == Swizzle::kNone)
        require(row_bytes % 16 == 0, "rows of a box must be multiples of 16 bytes, got " + std::to_string(row_bytes));
    else
        require(row_bytes == swizzle_row_bytes(spec.swizzle),
                "rows of a box must have the " + std::to_string(swizzle_row_bytes(spec.swizzle)) +
                    " bytes of its swizzle, got " + std::to_string(row_bytes));
    return spec;
}

}  // namespace moetrain
