// What CPU kernels share: rows of any floating dtype.
#pragma once
#include <c10/core/ScalarType.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

#include "common/clones.h"

namespace moetrain {

template <typename From, typename To>
MOETRAIN_INLINE void convert_row(const From* from, int64_t size, To* to) {
    for (int64_t i = 0; i < size; ++i)
        to[i] = static_cast<To>(from[i]);
}

// Acc is float or double; float64 data comes with double alone.
template <typename Acc>
MOETRAIN_INLINE void load_row(const void* data, at::ScalarType dtype, int64_t start, int64_t size, Acc* to) {
    switch (dtype) {
        case at::kBFloat16:
            return convert_row(static_cast<const c10::BFloat16*>(data) + start, size, to);
        case at::kHalf:
            return convert_row(static_cast<const c10::Half*>(data) + start, size, to);
        case at::kDouble:
            return convert_row(static_cast<const double*>(data) + start, size, to);
        default:
            return convert_row(static_cast<const float*>(data) + start, size, to);
    }
}

template <typename Acc>
MOETRAIN_INLINE void store_row(const Acc* from, int64_t size, void* data, at::ScalarType dtype, int64_t start) {
    switch (dtype) {
        case at::kBFloat16:
            return convert_row(from, size, static_cast<c10::BFloat16*>(data) + start);
        case at::kHalf:
            return convert_row(from, size, static_cast<c10::Half*>(data) + start);
        case at::kDouble:
            return convert_row(from, size, static_cast<double*>(data) + start);
        default:
            return convert_row(from, size, static_cast<float*>(data) + start);
    }
}

}  // namespace moetrain
