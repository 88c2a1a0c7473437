// What the CUDA side of operators shares.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <c10/util/Exception.h>

#include "cuda/common/launch.h"
#include "ops/common/debug.h"
#include "ops/common/optional.h"

namespace moetrain {

inline Element element_of(at::ScalarType dtype) {
    switch (dtype) {
        case at::kBFloat16:
            return Element::kBFloat16;
        case at::kHalf:
            return Element::kHalf;
        case at::kDouble:
            return Element::kDouble;
        default:
            return Element::kFloat;
    }
}

// One int64 on the device that a kernel lowers to the first bad position; undefined unless debugging.
inline at::Tensor new_breach(const at::Tensor& like) {
    return debug_checks() ? at::full({1}, kNoBreach, like.options().dtype(at::kLong)) : at::Tensor();
}

// Where a list's true length stands on the device, or null where its capacity is its length.
inline const int32_t* length_data(const OptionalTensor& offset_E1) {
    return offset_E1 ? offset_E1->const_data_ptr<int32_t>() + offset_E1->size(0) - 1 : nullptr;
}

inline int64_t* breach_data(const at::Tensor& breach) {
    return breach.defined() ? breach.mutable_data_ptr<int64_t>() : nullptr;
}

}  // namespace moetrain
