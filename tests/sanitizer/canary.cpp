// Two mistakes on demand, compiled into sanitized builds alone: launch/sanitize.sh makes sure that both are caught
// before it trusts a run that reports nothing.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

namespace {

// No check of `i`, on purpose.
double canary_read(const at::Tensor& x_N, int64_t i) { return x_N.const_data_ptr<float>()[i]; }

int64_t canary_double(int64_t value) {
    const int narrow = static_cast<int>(value);
    return narrow + narrow;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(moetrain, m) {
    m.def("canary_read(Tensor x_N, int i) -> float");
    m.def("canary_double(int value) -> int", &canary_double);
}

TORCH_LIBRARY_IMPL(moetrain, CPU, m) { m.impl("canary_read", &canary_read); }
