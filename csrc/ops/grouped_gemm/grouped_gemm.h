#pragma once
// grouped_gemm (varlen-M): c[m, :] = a[row[m] or m, :] @ b[slot[e] or e]^T for m in [offset[e], offset[e + 1]), or
// @ b[...] where b is [slots, K, N]. Rows of c from offset[-1] on are left unwritten.
#include <ATen/core/Tensor.h>

#include "ops/common/optional.h"
#include "ops/common/row_checks.h"

namespace moetrain {

// offset, slot and the number of slots belong together, on the device of `like`; shared with the varlen-K form and
// expert_mlp.
inline void check_groups(const char* op, const at::Tensor& offset_E1, const OptionalTensor& slot_E, int64_t num_slots,
                         const char* like_name, const at::Tensor& like) {
    check_offset(op, offset_E1, like_name, like);
    const int64_t num_groups = offset_E1.size(0) - 1;
    if (slot_E) {
        check_index(op, "slot", "[E]", *slot_E, like_name, like);
        TORCH_CHECK_VALUE(slot_E->size(0) == num_groups, op, ": slot must have one entry per group (", num_groups,
                          "), got ", slot_E->size(0));
    } else {
        TORCH_CHECK_VALUE(num_slots == num_groups, op, ": without slot there must be one slot per group (", num_groups,
                          "), got ", num_slots, " slots; pass slot to map groups to slots");
    }
}

// Reads values: the index tensors are on the CPU.
inline void check_group_values(const char* op, const at::Tensor& offset_E1, const OptionalTensor& slot_E,
                               int64_t num_slots, int64_t capacity) {
    check_offset_values(op, offset_E1, capacity);
    if (slot_E) check_id_values(op, "slot", *slot_E, slot_E->size(0), num_slots, "the number of slots");
}

// The contract both backends share; throws on the first breach.
inline void check_grouped_gemm(const at::Tensor& a_MK, const at::Tensor& b_SNK, const at::Tensor& offset_E1,
                               const OptionalTensor& slot_E, const OptionalTensor& row_M, bool b_is_kn) {
    constexpr auto kOp = "grouped_gemm";
    check_rows(kOp, "a", row_M ? "[T, K]" : "[M, K]", a_MK, 2);
    check_rows(kOp, "b", b_is_kn ? "[slots, K, N]" : "[slots, N, K]", b_SNK, 3);
    check_float(kOp, "a", a_MK);
    check_same_dtype(kOp, "b", b_SNK, "a", a_MK);
    check_same_device(kOp, "b", b_SNK, "a", a_MK);
    const int64_t b_inner = b_SNK.size(b_is_kn ? 1 : 2);
    TORCH_CHECK_VALUE(b_inner == a_MK.size(1), kOp, ": b must be ", b_is_kn ? "[slots, K, N]" : "[slots, N, K]",
                      " with K = ", a_MK.size(1), " as in a, got ", b_SNK.sizes());
    check_groups(kOp, offset_E1, slot_E, b_SNK.size(0), "a", a_MK);
    if (row_M) check_index(kOp, "row", "[M]", *row_M, "a", a_MK);
}

// Reads values: the index tensors are on the CPU.
inline void check_grouped_gemm_values(const at::Tensor& a_MK, const at::Tensor& b_SNK, const at::Tensor& offset_E1,
                                      const OptionalTensor& slot_E, const OptionalTensor& row_M) {
    constexpr auto kOp = "grouped_gemm";
    check_group_values(kOp, offset_E1, slot_E, b_SNK.size(0), row_M ? row_M->size(0) : a_MK.size(0));
    if (row_M) {
        const int64_t length = offset_E1.const_data_ptr<int32_t>()[offset_E1.size(0) - 1];
        check_id_values(kOp, "row", *row_M, length, a_MK.size(0), "the number of rows of a");
    }
}

at::Tensor grouped_gemm_cpu(const at::Tensor& a_MK, const at::Tensor& b_SNK, const at::Tensor& offset_E1,
                            const OptionalTensor& slot_E, const OptionalTensor& row_M, bool b_is_kn);
at::Tensor grouped_gemm_cuda(const at::Tensor& a_MK, const at::Tensor& b_SNK, const at::Tensor& offset_E1,
                             const OptionalTensor& slot_E, const OptionalTensor& row_M, bool b_is_kn);

}  // namespace moetrain
