#pragma once
#include <ATen/core/Tensor.h>

#include "cpu/isa/isa.h"

namespace moetrain {

inline isa::Dtype dtype_of(const at::Tensor& x) {
    switch (x.scalar_type()) {
        case at::kBFloat16:
            return isa::Dtype::kBf16;
        case at::kHalf:
            return isa::Dtype::kFp16;
        case at::kDouble:
            return isa::Dtype::kFp64;
        default:
            return isa::Dtype::kFp32;
    }
}

}  // namespace moetrain
