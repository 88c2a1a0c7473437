// What the operators with tensor-core kernels share on CUDA: each architecture's launchers in one table, the choice
// between the tables, and what kernels demand of tensors. Nothing here waits for the device.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <limits>
#include <string>
#include <string_view>

#include "cuda/expert_mlp/sm80/launch.h"
#include "cuda/expert_mlp/sm90/launch.h"
#include "cuda/grouped_gemm/sm80/launch.h"
#include "cuda/grouped_gemm/sm90/launch.h"
#include "cuda/routing/group_pairs.h"
#include "ops/common/optional.h"
#include "ops/common/row_checks.h"

namespace moetrain {

constexpr int64_t kAlignedElements = 8;  // of bf16: 16 bytes

// The launchers of one architecture; see csrc/cuda/{grouped_gemm,expert_mlp}/sm90/launch.h.
struct TensorCoreKernels {
    using Product = cudaError_t(const gemm::GroupedGemmProblem&, const gemm::RowStore&, int, cudaStream_t);
    using Sum = cudaError_t(const gemm::VarlenKProblem&, Bf16*, int, cudaStream_t);
    using FloatSum = cudaError_t(const gemm::VarlenKProblem&, float*, bool, int, cudaStream_t);

    Product* grouped_gemm;
    Product* grouped_gemm_mn_major;
    Sum* varlen_k_gemm;
    FloatSum* varlen_k_gemm_float;
    cudaError_t (*up_projection)(const experts::UpProjection&, int, cudaStream_t);
    int (*num_weight_grad_parts)(int64_t);
    cudaError_t (*hidden_grad)(const experts::HiddenGrad&, int, cudaStream_t);
};

inline constexpr TensorCoreKernels kSm90Kernels{.grouped_gemm = sm90::launch_grouped_gemm,
                                                .grouped_gemm_mn_major = sm90::launch_grouped_gemm_mn_major,
                                                .varlen_k_gemm = sm90::launch_varlen_k_gemm,
                                                .varlen_k_gemm_float = sm90::launch_varlen_k_gemm,
                                                .up_projection = sm90::launch_up_projection,
                                                .num_weight_grad_parts = sm90::num_weight_grad_parts,
                                                .hidden_grad = sm90::launch_hidden_grad};
inline constexpr TensorCoreKernels kSm80Kernels{.grouped_gemm = sm80::launch_grouped_gemm,
                                                .grouped_gemm_mn_major = sm80::launch_grouped_gemm_mn_major,
                                                .varlen_k_gemm = sm80::launch_varlen_k_gemm,
                                                .varlen_k_gemm_float = sm80::launch_varlen_k_gemm,
                                                .up_projection = sm80::launch_up_projection,
                                                .num_weight_grad_parts = sm80::num_weight_grad_parts,
                                                .hidden_grad = sm80::launch_hidden_grad};

// What MOETRAIN_CUDA_PATH names, or nothing; see moetrain/ops/cuda_path.py. Read per call: no state.
inline std::string_view wanted_cuda_path() {
    const char* value = std::getenv("MOETRAIN_CUDA_PATH");
    const std::string_view wanted = value == nullptr ? "" : value;
    constexpr std::array<std::string_view, 6> kPaths{"", "sm90", "sm80", "grouped_mm", "simple", "loop"};
    TORCH_CHECK_VALUE(std::find(kPaths.begin(), kPaths.end(), wanted) != kPaths.end(),
                      "MOETRAIN_CUDA_PATH must be sm90, sm80, grouped_mm, simple or loop, got ", wanted,
                      "; unset it to let moetrain choose");
    return wanted;
}

inline int attribute_of(const at::Tensor& t, cudaDeviceAttr attribute) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, t.get_device()));
    return value;
}

// Kernels, or else what they need.
struct KernelChoice {
    const TensorCoreKernels* kernels = nullptr;
    std::string obstacle;
};

// The best kernels that the device of `t` runs, or those that MOETRAIN_CUDA_PATH names. `obstacle` is what any would
// need of the tensors and does not get; empty: nothing.
inline KernelChoice choose_kernels(const at::Tensor& t, std::string obstacle) {
    if (!obstacle.empty()) return {nullptr, std::move(obstacle)};
    const std::string_view wanted = wanted_cuda_path();
    const int major = attribute_of(t, cudaDevAttrComputeCapabilityMajor);
    if (major == 9 && wanted != "sm80") return {&kSm90Kernels, ""};
    if (major >= 8 && wanted != "sm90") return {&kSm80Kernels, ""};
    return {nullptr, c10::str("compute capability ", wanted == "sm90" ? "9.0" : "8.0 or later",
                              ", this device has major ", major)};
}

// The same for operators that have simple kernels too: null for those.
inline const TensorCoreKernels* choose_kernels_or_simple(const char* op, const at::Tensor& t, std::string obstacle) {
    const std::string_view wanted = wanted_cuda_path();
    if (wanted == "simple") return nullptr;
    const KernelChoice choice = choose_kernels(t, std::move(obstacle));
    if (choice.kernels != nullptr) return choice.kernels;
    TORCH_CHECK_VALUE(wanted != "sm90" && wanted != "sm80", "MOETRAIN_CUDA_PATH is ", wanted, ", which for ", op,
                      " needs ", choice.obstacle, "; unset it to let moetrain choose");
    return nullptr;
}

// What bf16 on the device of `t` needs to run on tensor cores, where it does not and nobody asked for that; empty else.
inline std::string reason_for_simple_kernels(const at::Tensor& t, std::string obstacle) {
    if (t.scalar_type() != at::kBFloat16 || wanted_cuda_path() == "simple") return "";
    return choose_kernels(t, std::move(obstacle)).obstacle;
}

inline Bf16* bf16_data(const at::Tensor& t) { return static_cast<Bf16*>(t.data_ptr()); }

inline bool is_aligned_address(const at::Tensor& t) { return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0; }

// Whether every row of bf16 starts at a multiple of 16 bytes.
inline bool is_aligned(const at::Tensor& t) {
    if (!is_aligned_address(t)) return false;
    for (int64_t dim = 0; dim + 1 < t.dim(); ++dim) {
        if (t.size(dim) > 1 && t.stride(dim) % kAlignedElements != 0) return false;
    }
    return true;
}

inline at::Tensor aligned(const at::Tensor& t) { return is_aligned(t) ? t : t.clone(at::MemoryFormat::Contiguous); }

// What two sides of a product need, or nothing.
inline std::string obstacle_to_sizes(const char* names, int64_t first, int64_t second) {
    if (first % kAlignedElements == 0 && second % kAlignedElements == 0) return "";
    return c10::str(names, " to be multiples of ", kAlignedElements, ", got ", first, " and ", second);
}

inline std::string obstacle_to_dtype(const at::Tensor& t) {
    return t.scalar_type() == at::kBFloat16 ? "" : c10::str("BFloat16, got ", t.scalar_type());
}

// Kernels take a stride of 0 for "no gaps". Biases may have it: their strides are taken as they are.
inline std::string obstacle_to_sharing(const char* name, const at::Tensor& w) {
    if (w.size(0) <= 1 || w.stride(0) != 0) return "";
    return c10::str("a matrix of its own for each slot of ", name, ", got strides ", w.strides());
}

// Kernels count rows of all slots, and list the groups of slots that groups share.
inline std::string obstacle_to_slots(const OptionalTensor& slot_E, int64_t num_slots, int64_t rows_per_slot) {
    if (slot_E && num_slots > kMaxExpertsToGroup)
        return c10::str("at most ", kMaxExpertsToGroup, " slots, got ", num_slots);
    const int64_t num_rows = num_slots * rows_per_slot;
    if (num_rows <= std::numeric_limits<int32_t>::max()) return "";
    return c10::str("slots times rows of a slot to be at most 2147483647, got ", num_rows);
}

// The groups of each slot, ascending; null pointers where group e has slot e.
class SlotLists {
 public:
    SlotLists() = default;
    SlotLists(const OptionalTensor& slot_E, int64_t num_slots, cudaStream_t stream) : num_slots_(num_slots) {
        if (!slot_E) return;
        const int64_t num_groups = slot_E->size(0);
        lists_ = at::empty({num_slots + 1 + num_groups}, slot_E->options());
        const auto scratch = at::empty({group_pairs_scratch_size(num_groups, num_slots)}, slot_E->options());
        auto* offsets = lists_.mutable_data_ptr<int32_t>();
        C10_CUDA_CHECK(launch_group_pairs(slot_E->const_data_ptr<int32_t>(), num_groups, num_slots,
                                          offsets + num_slots + 1, offsets, scratch.mutable_data_ptr<int32_t>(),
                                          nullptr, stream));
    }
    const int32_t* offsets() const { return lists_.defined() ? lists_.const_data_ptr<int32_t>() : nullptr; }
    const int32_t* groups() const { return lists_.defined() ? offsets() + num_slots_ + 1 : nullptr; }

 private:
    at::Tensor lists_;  // offsets [S + 1], then groups [E]
    int64_t num_slots_ = 0;
};

inline gemm::VarlenKProblem::Operand varlen_k_operand(const at::Tensor& rows, const int32_t* row_indices) {
    return {.data = bf16_data(rows),
            .num_rows = rows.size(0),
            .width = rows.size(1),
            .stride = row_stride(rows),
            .row_indices = row_indices};
}

}  // namespace moetrain
