#pragma once
// expert_mlp: y[r] = sum over r's pairs, groups ascending, of weight * (act(x[r] @ w_in^T + b_in) @ w_out^T + b_out).
// Shapes: R rows, D width, F hidden width, N pairs (a capacity; offset[-1] is their number), S slots, E groups.
#include <ATen/core/Tensor.h>

#include <string_view>
#include <tuple>

#include "ops/common/fields.h"
#include "ops/common/optional.h"
#include "ops/grouped_gemm/grouped_gemm.h"

namespace moetrain {

// The tensors that forward and backward both take.
struct ExpertMlpTensors {
    at::Tensor x_RD;
    at::Tensor row_N;
    at::Tensor weight_N;
    at::Tensor offset_E1;
    at::Tensor w_in;
    at::Tensor w_out;
    OptionalTensor slot_E;
    OptionalTensor b_in;
    OptionalTensor b_out;

    using Fields = FieldTypes<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, OptionalTensor,
                              OptionalTensor, OptionalTensor>;
};

// And what they compute of them; in backward's schema h stands between the two.
struct ExpertMlp : ExpertMlpTensors {
    std::string_view activation;

    using Fields = FieldTypes<ExpertMlpTensors, std::string_view>;

    bool gated() const { return activation == "swiglu"; }
    int64_t parts() const { return gated() ? 2 : 1; }
    int64_t width() const { return x_RD.size(1); }
    int64_t hidden() const { return w_in.size(2); }
    int64_t num_slots() const { return w_in.size(0); }
    // Columns of the hidden rows kept for the backward pass: whole panels of 64.
    int64_t hidden_columns() const {
        const int64_t per_panel = gated() ? 32 : 64;
        return (hidden() + per_panel - 1) / per_panel * 64;
    }
};

inline void check_expert_weights(const ExpertMlp& in) {
    constexpr auto kOp = "expert_mlp";
    const int64_t slots = in.w_in.size(0), parts = in.parts(), width = in.width(), hidden = in.w_in.size(2);
    check_sizes(kOp, "w_in", in.w_in, {slots, parts, hidden, width},
                in.gated() ? "[slots, 2 (gate, up), F, D]" : "[slots, 1, F, D]");
    TORCH_CHECK_VALUE(hidden > 0, kOp, ": w_in must have F >= 1 rows, got ", in.w_in.sizes(),
                      "; give the experts hidden units");
    check_contiguous_rows(kOp, "w_in", in.w_in);
    check_same_dtype(kOp, "w_in", in.w_in, "x", in.x_RD);
    check_same_device(kOp, "w_in", in.w_in, "x", in.x_RD);
    check_sizes(kOp, "w_out", in.w_out, {slots, width, hidden}, "[slots, D, F]");
    check_contiguous_rows(kOp, "w_out", in.w_out);
    check_same_dtype(kOp, "w_out", in.w_out, "x", in.x_RD);
    check_same_device(kOp, "w_out", in.w_out, "x", in.x_RD);
    if (in.b_in) {
        check_sizes(kOp, "b_in", *in.b_in, {slots, parts, hidden}, "[slots, parts, F]");
        check_contiguous_rows(kOp, "b_in", *in.b_in);
        check_same_dtype(kOp, "b_in", *in.b_in, "x", in.x_RD);
        check_same_device(kOp, "b_in", *in.b_in, "x", in.x_RD);
    }
    if (in.b_out) {
        check_sizes(kOp, "b_out", *in.b_out, {slots, width}, "[slots, D]");
        check_contiguous_rows(kOp, "b_out", *in.b_out);
        check_same_dtype(kOp, "b_out", *in.b_out, "x", in.x_RD);
        check_same_device(kOp, "b_out", *in.b_out, "x", in.x_RD);
    }
}

// The contract all backends share; throws on the first breach.
inline void check_expert_mlp(const ExpertMlp& in) {
    constexpr auto kOp = "expert_mlp";
    TORCH_CHECK_VALUE(in.activation == "swiglu" || in.activation == "gelu" || in.activation == "relu2", kOp,
                      ": activation must be swiglu, gelu or relu2, got ", in.activation);
    check_rows(kOp, "x", "[R, D]", in.x_RD, 2);
    check_float(kOp, "x", in.x_RD);
    TORCH_CHECK_VALUE(in.width() > 0, kOp, ": x must have D >= 1 columns, got ", in.x_RD.sizes(),
                      "; give the rows a width");
    TORCH_CHECK_VALUE(in.w_in.dim() == 4, kOp, ": w_in must be [slots, ", in.parts(), ", F, D], got ", in.w_in.sizes());
    check_expert_weights(in);
    check_groups(kOp, in.offset_E1, in.slot_E, in.w_in.size(0), "x", in.x_RD);
    check_index(kOp, "row", "[N]", in.row_N, "x", in.x_RD);
    check_sizes(kOp, "weight", in.weight_N, {in.row_N.size(0)}, "[N]");
    check_dtype(kOp, "weight", in.weight_N, at_least_fp32(in.x_RD.scalar_type()));
    check_contiguous(kOp, "weight", in.weight_N);
    check_same_device(kOp, "weight", in.weight_N, "x", in.x_RD);
}

inline void check_expert_mlp_backward(const ExpertMlp& in, const at::Tensor& dy_RD, const OptionalTensor& h_NP) {
    constexpr auto kOp = "expert_mlp_backward";
    check_expert_mlp(in);
    check_sizes(kOp, "dy", dy_RD, in.x_RD.sizes(), "[R, D]");
    check_rows(kOp, "dy", "[R, D]", dy_RD, 2);
    check_same_dtype(kOp, "dy", dy_RD, "x", in.x_RD);
    if (!h_NP) return;
    check_sizes(kOp, "h", *h_NP, {in.row_N.size(0), in.hidden_columns()}, "[N, hidden columns]");
    check_contiguous(kOp, "h", *h_NP);
    check_same_dtype(kOp, "h", *h_NP, "x", in.x_RD);
}

// Reads values: the index tensors are on the CPU. Returns the number of pairs.
inline int64_t check_expert_mlp_values(const ExpertMlp& in) {
    constexpr auto kOp = "expert_mlp";
    check_group_values(kOp, in.offset_E1, in.slot_E, in.num_slots(), in.row_N.size(0));
    const int64_t length = in.offset_E1.const_data_ptr<int32_t>()[in.offset_E1.size(0) - 1];
    check_id_values(kOp, "row", in.row_N, length, in.x_RD.size(0), "the number of rows of x");
    return length;
}

// The same wherever they are.
inline void check_expert_mlp_values_on_cpu(const ExpertMlp& in) {
    ExpertMlp readable = in;
    readable.row_N = in.row_N.cpu();
    readable.offset_E1 = in.offset_E1.cpu();
    readable.slot_E = on_cpu(in.slot_E);
    check_expert_mlp_values(readable);
}

// y, and h [N, hidden_columns] (empty unless save_h).
std::tuple<at::Tensor, at::Tensor> expert_mlp_cpu(const ExpertMlp& in, bool save_h);
// dx, dweight, dw_in, dw_out, db_in, db_out (the last two empty where there is no bias).
using ExpertMlpGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
ExpertMlpGradients expert_mlp_backward_cpu(const at::Tensor& dy_RD, ExpertMlpTensors tensors,
                                           const OptionalTensor& h_NP, std::string_view activation);
// The contract alone, on any device.
void check_expert_mlp_op(const ExpertMlp& in);

}  // namespace moetrain
