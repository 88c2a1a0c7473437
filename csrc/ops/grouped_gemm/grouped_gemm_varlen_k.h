#pragma once
// grouped_gemm_varlen_k: out[s] = sum over groups e with slot[e] (or e) == s, ascending, and over their rows m of
// a[row_a[m] or m, :]^T b[row_b[m] or m, :]. Slots without rows are zero; the form that ends in _ adds to out instead.
#include <ATen/core/Tensor.h>

#include "ops/common/optional.h"
#include "ops/grouped_gemm/grouped_gemm.h"

namespace moetrain {

// What both forms take: two matrices whose rows are summed over, the lists that may pick those rows, the groups.
struct VarlenK {
    at::Tensor a_MI;
    at::Tensor b_MJ;
    at::Tensor offset_E1;
    OptionalTensor slot_E;
    OptionalTensor row_a_M;
    OptionalTensor row_b_M;

    using Fields = FieldTypes<at::Tensor, at::Tensor, at::Tensor, OptionalTensor, OptionalTensor, OptionalTensor>;

    int64_t capacity() const { return row_a_M ? row_a_M->size(0) : a_MI.size(0); }
};

// The contract both backends share; throws on the first breach.
inline void check_varlen_k(const VarlenK& in, int64_t num_slots) {
    constexpr auto kOp = "grouped_gemm_varlen_k";
    check_rows(kOp, "a", in.row_a_M ? "[T, I]" : "[M, I]", in.a_MI, 2);
    check_rows(kOp, "b", in.row_b_M ? "[T, J]" : "[M, J]", in.b_MJ, 2);
    check_float(kOp, "a", in.a_MI);
    check_same_dtype(kOp, "b", in.b_MJ, "a", in.a_MI);
    check_same_device(kOp, "b", in.b_MJ, "a", in.a_MI);
    TORCH_CHECK_VALUE(num_slots >= 0, kOp, ": num_slots must be at least 0, got ", num_slots);
    check_groups(kOp, in.offset_E1, in.slot_E, num_slots, "a", in.a_MI);
    if (in.row_a_M) check_index(kOp, "row_a", "[M]", *in.row_a_M, "a", in.a_MI);
    if (in.row_b_M) check_index(kOp, "row_b", "[M]", *in.row_b_M, "a", in.a_MI);
    const int64_t b_rows = in.row_b_M ? in.row_b_M->size(0) : in.b_MJ.size(0);
    TORCH_CHECK_VALUE(in.capacity() == b_rows, kOp, ": a and b must pair up row by row, got ", in.capacity(),
                      in.row_a_M ? " entries in row_a and " : " rows in a and ", b_rows,
                      in.row_b_M ? " entries in row_b" : " rows in b");
}

// The same, and for the form that adds to out.
inline void check_varlen_k_out(const at::Tensor& out_SIJ, const VarlenK& in) {
    constexpr auto kOp = "grouped_gemm_varlen_k";
    const auto dtype = in.a_MI.scalar_type();
    check_rows(kOp, "out", "[slots, I, J]", out_SIJ, 3);
    check_varlen_k(in, out_SIJ.size(0));
    TORCH_CHECK_TYPE(out_SIJ.scalar_type() == dtype || out_SIJ.scalar_type() == at_least_fp32(dtype), kOp,
                     ": out must have the dtype of a (", dtype, ") or ", at_least_fp32(dtype), ", got ",
                     out_SIJ.scalar_type(), "; add into one of those");
    check_same_device(kOp, "out", out_SIJ, "a", in.a_MI);
    TORCH_CHECK_VALUE(out_SIJ.size(1) == in.a_MI.size(1) && out_SIJ.size(2) == in.b_MJ.size(1), kOp,
                      ": out must be [slots, ", in.a_MI.size(1), ", ", in.b_MJ.size(1), "], got ", out_SIJ.sizes());
    const int64_t slot_span = (out_SIJ.size(1) - 1) * row_stride(out_SIJ) + out_SIJ.size(2);
    TORCH_CHECK_VALUE(out_SIJ.size(0) <= 1 || out_SIJ.numel() == 0 || out_SIJ.stride(0) >= slot_span, kOp,
                      ": slots of out must not overlap, got sizes ", out_SIJ.sizes(), " and strides ",
                      out_SIJ.strides(), "; pass memory of its own to each slot");
}

// Reads values: the index tensors are on the CPU.
inline void check_varlen_k_values(const VarlenK& in, int64_t num_slots) {
    constexpr auto kOp = "grouped_gemm_varlen_k";
    check_group_values(kOp, in.offset_E1, in.slot_E, num_slots, in.capacity());
    const int64_t length = in.offset_E1.const_data_ptr<int32_t>()[in.offset_E1.size(0) - 1];
    if (in.row_a_M) check_id_values(kOp, "row_a", *in.row_a_M, length, in.a_MI.size(0), "the number of rows of a");
    if (in.row_b_M) check_id_values(kOp, "row_b", *in.row_b_M, length, in.b_MJ.size(0), "the number of rows of b");
}

at::Tensor grouped_gemm_varlen_k_cpu(const VarlenK& in, int64_t num_slots);
void grouped_gemm_varlen_k_accumulate_cpu(at::Tensor& out_SIJ, const VarlenK& in);

}  // namespace moetrain
