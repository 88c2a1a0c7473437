#pragma once
// What the CUDA side of the ops on lists of rows shares.
#include <optional>

#include "ops/common/cuda.h"

namespace moetrain {

inline std::optional<at::Tensor> on_cpu(const std::optional<at::Tensor>& t) {
    return t ? std::optional<at::Tensor>(t->cpu()) : std::nullopt;
}

inline const int32_t* index_data(const std::optional<at::Tensor>& t) {
    return t ? t->const_data_ptr<int32_t>() : nullptr;
}

// Where a list's true length stands on the device, or null where its capacity is its length.
inline const int32_t* length_data(const std::optional<at::Tensor>& offset_E1) {
    return offset_E1 ? offset_E1->const_data_ptr<int32_t>() + offset_E1->size(0) - 1 : nullptr;
}

}  // namespace moetrain
