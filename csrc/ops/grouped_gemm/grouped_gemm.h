#pragma once
// grouped_gemm (varlen-M): c[m, :] = a[row[m] or m, :] @ b[slot[e] or e]^T for m in [offset[e], offset[e + 1]), or
// @ b[...] where b is [slots, K, N]. Rows of c from offset[-1] on are left unwritten.
#include <ATen/core/Tensor.h>

#include "ops/common/fields.h"
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

// What it is called with.
struct GroupedProduct {
    at::Tensor a_MK;
    at::Tensor b_SNK;
    at::Tensor offset_E1;
    OptionalTensor slot_E;
    OptionalTensor row_M;
    bool b_is_kn;

    using Fields = FieldTypes<at::Tensor, at::Tensor, at::Tensor, OptionalTensor, OptionalTensor, bool>;

    int64_t capacity() const { return row_M ? row_M->size(0) : a_MK.size(0); }
    int64_t inner() const { return a_MK.size(1); }
    int64_t cols() const { return b_SNK.size(b_is_kn ? 2 : 1); }
};

// The contract both backends share; throws on the first breach.
inline void check_grouped_gemm(const GroupedProduct& in) {
    const auto& [a_MK, b_SNK, offset_E1, slot_E, row_M, b_is_kn] = in;
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
inline void check_grouped_gemm_values(const GroupedProduct& in) {
    constexpr auto kOp = "grouped_gemm";
    check_group_values(kOp, in.offset_E1, in.slot_E, in.b_SNK.size(0), in.capacity());
    if (in.row_M) {
        const int64_t length = in.offset_E1.const_data_ptr<int32_t>()[in.offset_E1.size(0) - 1];
        check_id_values(kOp, "row", *in.row_M, length, in.a_MK.size(0), "the number of rows of a");
    }
}

at::Tensor grouped_gemm_cpu(const GroupedProduct& in);
at::Tensor grouped_gemm_cuda(const GroupedProduct& in);

}  // namespace moetrain
