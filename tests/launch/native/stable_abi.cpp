// What the operators of moetrain would need of torch's stable ABI: see test_stable_abi.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> choose(Tensor x, std::string score, std::optional<Tensor> bias, int64_t k, double scale,
                                  bool plain, torch::headeronly::ScalarType dtype) {
    STD_TORCH_CHECK(k >= 0, "choose: k must be at least 0, got ", k);
    const bool first = score == "first" && scale > 0 && plain;
    return {first ? x : bias.value_or(x), torch::stable::new_zeros(x, x.sizes(), dtype)};
}

void add_sources_(Tensor target, std::vector<Tensor> sources) {
    auto* const out = target.mutable_data_ptr<float>();
    torch::stable::parallel_for(0, target.numel(), 1, [&](int64_t begin, int64_t end) {
        for (const Tensor& source : sources) {
            for (int64_t i = begin; i < end; ++i)
                out[i] += source.const_data_ptr<float>()[i];
        }
    });
}

std::string obstacle(Tensor /*x*/) { return "none"; }

STABLE_TORCH_LIBRARY(stable_abi, m) {
    m.def(
        "choose(Tensor x, str score, Tensor? bias, int k, float scale, bool plain, ScalarType dtype) -> (Tensor, "
        "Tensor)");
    m.def("add_sources_(Tensor(a!) target, Tensor[] sources) -> ()");
    m.def("obstacle(Tensor x) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(stable_abi, CPU, m) {
    m.impl("choose", TORCH_BOX(&choose));
    m.impl("add_sources_", TORCH_BOX(&add_sources_));
    m.impl("obstacle", TORCH_BOX(&obstacle));
}

}  // namespace
