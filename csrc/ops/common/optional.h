// Tensors that a caller may leave out.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>

namespace moetrain {

using OptionalTensor = std::optional<at::Tensor>;

template <typename T>
const T* data_or_null(const OptionalTensor& t) {
    return t ? t->const_data_ptr<T>() : nullptr;
}

inline OptionalTensor on_cpu(const OptionalTensor& t) { return t ? OptionalTensor(t->cpu()) : std::nullopt; }

}  // namespace moetrain
