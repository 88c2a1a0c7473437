#include <c10/util/Exception.h>

#include <atomic>

#include "ops/grouped_gemm/simple_kernels.h"

namespace moetrain {
namespace {

std::atomic<bool> has_been_said{false};

}  // namespace

void warn_of_simple_kernels(const char* op, const std::string& obstacle) {
    if (has_been_said.exchange(true)) return;
    TORCH_WARN(op, " runs its simple kernels, without tensor cores, since the others need ", obstacle,
               "; MOETRAIN_CUDA_PATH=simple silences this");
}

void quieten_simple_kernels() { has_been_said = true; }

}  // namespace moetrain
