// Staging memory in two halves, used in turn, so that what is in flight is not overwritten. Each grows to the largest
// request of both and is then never allocated again.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <array>

namespace moetrain::comm {

class Arena {
 public:
    struct Half {
        at::Tensor memory;
        int64_t ticket = -1;  // of the last collective that used it
    };

    explicit Arena(at::TensorOptions options) : options_(options) {}

    // The half whose turn it is. The caller sees to it that its last user has finished.
    Half& next() { return halves_[num_uses_++ % halves_.size()]; }

    // `numel` elements of a half that is not in flight.
    at::Tensor take(Half& half, int64_t numel) {
        largest_ = std::max(largest_, numel);
        if (!half.memory.defined() || half.memory.numel() < largest_) {
            const c10::InferenceMode ordinary(false);  // an evaluation may come first
            half.memory = at::Tensor();                // before the larger one
            half.memory = at::empty({largest_}, options_);
        }
        return half.memory.narrow(0, 0, numel);
    }

    int64_t num_bytes() const {
        int64_t total = 0;
        for (const Half& half : halves_)
            if (half.memory.defined()) total += static_cast<int64_t>(half.memory.nbytes());
        return total;
    }

 private:
    at::TensorOptions options_;
    std::array<Half, 2> halves_;
    size_t num_uses_ = 0;
    int64_t largest_ = 0;
};

}  // namespace moetrain::comm
