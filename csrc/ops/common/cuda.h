// What the CUDA side of operators shares.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/full.h>
#include <c10/util/Exception.h>

#include <cstdlib>
#include <string_view>

#include "cuda/common/launch.h"

namespace moetrain {

// Whether ids are checked on the device and reported, which waits for the device. Read per call: no state.
inline bool debug_checks() {
    const char* value = std::getenv("MOETRAIN_DEBUG");
    return value != nullptr && std::string_view(value) == "1";
}

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

inline int64_t* breach_data(const at::Tensor& breach) {
    return breach.defined() ? breach.mutable_data_ptr<int64_t>() : nullptr;
}

}  // namespace moetrain
