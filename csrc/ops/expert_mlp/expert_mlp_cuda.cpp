// expert_mlp by tensor-core kernels: bf16, with the launchers of one architecture and the sums of csrc/cuda/expert_mlp.
// Everything else is refused here; moetrain/ops/cuda_path.py chooses, and moetrain/ops/expert_parts.py composes it from
// other operators.
//
// Temporaries, in elements of bf16: forward N * F (A), then also N * D (Y). Backward N * parts * F (dH) and N * F (A),
// which is released before N * D (dX of each pair). Nothing waits for the device; all is on the current stream.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/expert_mlp/launch.h"
#include "cuda/rows/scatter_add_rows.h"
#include "ops/common/boxed.h"
#include "ops/common/cuda.h"
#include "ops/expert_mlp/expert_mlp.h"
#include "ops/grouped_gemm/tensor_core_cuda.h"

namespace moetrain {
namespace {

using gemm::GroupedGemmProblem;
using gemm::VarlenKProblem;

// Empty where there is no bias.
at::Tensor gradient_of(const OptionalTensor& bias, const at::TensorOptions& options) {
    return bias ? at::empty(bias->sizes(), options) : at::empty({0}, options);
}

// The gate and up parts of w_in, or of b_in, follow one another.
bool parts_adjoin(const at::Tensor& t) {
    return t.size(1) == 1 || t.stride(1) == t.size(2) * (t.dim() == 4 ? row_stride(t) : 1);
}

// What the kernels need and do not get; rows of x and dy are copied where they are not aligned. Says the same as
// obstacle_to in moetrain/ops/cuda_path.py, which also knows what to do instead.
std::string obstacle_to(const ExpertMlp& in) {
    if (auto obstacle = obstacle_to_dtype(in.x_RD); !obstacle.empty()) return obstacle;
    if (auto obstacle = obstacle_to_sizes("D and F", in.width(), in.hidden()); !obstacle.empty()) return obstacle;
    const bool biases_fit =
        (!in.b_in || (is_aligned(*in.b_in) && parts_adjoin(*in.b_in))) && (!in.b_out || is_aligned(*in.b_out));
    if (!is_aligned(in.w_in) || !parts_adjoin(in.w_in) || !is_aligned(in.w_out) || !biases_fit)
        return c10::str("weights and biases at multiples of 16 bytes, gate and up adjoining, got strides ",
                        in.w_in.strides(), " and ", in.w_out.strides());
    for (const auto& [name, w] : {std::pair{"w_in", in.w_in}, std::pair{"w_out", in.w_out}})
        if (auto obstacle = obstacle_to_sharing(name, w); !obstacle.empty()) return obstacle;
    return obstacle_to_slots(in.slot_E, in.num_slots(), std::max(in.parts() * in.hidden(), in.width()));
}

const TensorCoreKernels& kernels_for(const ExpertMlp& in) {
    const KernelChoice choice = choose_kernels(in.x_RD, obstacle_to(in));
    TORCH_CHECK_VALUE(choice.kernels != nullptr, "expert_mlp: its CUDA kernels need ", choice.obstacle,
                      "; set MOETRAIN_CUDA_PATH=simple");
    return *choice.kernels;
}

void check_values_if_debugging(const ExpertMlp& in) {
    if (debug_checks()) check_expert_mlp_values_on_cpu(in);
}

// One call: what every launch takes from the operator's inputs.
struct Call {
    const ExpertMlp& in;
    const TensorCoreKernels& kernels;
    at::Tensor x_RD;
    int num_blocks;
    cudaStream_t stream;
    int64_t num_pairs = in.row_N.size(0);
    int64_t num_groups = in.offset_E1.size(0) - 1;
    int64_t columns = in.parts() * in.hidden();  // of H
    const int32_t* row = in.row_N.const_data_ptr<int32_t>();
    const int32_t* offset = in.offset_E1.const_data_ptr<int32_t>();
    const float* weight = in.weight_N.const_data_ptr<float>();

    explicit Call(const ExpertMlp& inputs)
        : in(inputs),
          kernels(kernels_for(inputs)),
          x_RD(aligned(inputs.x_RD)),
          num_blocks(attribute_of(inputs.x_RD, cudaDevAttrMultiProcessorCount)),
          stream(c10::cuda::getCurrentCUDAStream()) {}

    bool has_work() const { return num_pairs > 0 && num_groups > 0 && in.num_slots() > 0 && in.x_RD.size(0) > 0; }

    experts::Activation activation() const {
        if (in.gated()) return experts::Activation::kSwiglu;
        return in.activation == "gelu" ? experts::Activation::kGelu : experts::Activation::kRelu2;
    }

    at::Tensor pair_rows(int64_t width) const { return at::empty({num_pairs, width}, in.x_RD.options()); }

    // rows · wᵀ, rows in place or, with `gathers`, those that row_N names. w is [slots, columns, depth], or MN-major.
    GroupedGemmProblem product(const at::Tensor& rows, bool gathers, const at::Tensor& w, int64_t num_columns,
                               int64_t depth) const {
        return {.a = bf16_data(rows),
                .b = bf16_data(w),
                .row_indices = gathers ? row : nullptr,
                .group_offsets = offset,
                .slots = data_or_null<int32_t>(in.slot_E),
                .num_a_rows = rows.size(0),
                .num_groups = num_groups,
                .num_slots = in.num_slots(),
                .num_columns = num_columns,
                .depth = depth,
                .a_stride = row_stride(rows),
                .b_row_stride = row_stride(w),
                .b_slot_stride = w.size(0) > 1 ? w.stride(0) : 0};
    }

    void project_up(Bf16* h, int64_t h_stride, Bf16* a) const {
        const experts::UpProjection up{.product = product(x_RD, true, in.w_in, columns, in.width()),
                                       .h = h,
                                       .h_stride = h_stride,
                                       .a = a,
                                       .weight = weight,
                                       .bias = in.b_in ? bf16_data(*in.b_in) : nullptr,
                                       .bias_stride = in.b_in ? in.b_in->stride(0) : 0,
                                       .activation = activation()};
        C10_CUDA_CHECK(kernels.up_projection(up, num_blocks, stream));
    }

    // out[r] = the sum of y over r's pairs, experts ascending.
    void sum_pairs(const at::Tensor& y_ND, const at::Tensor& out_RD) const {
        const int64_t num_rows = out_RD.size(0);
        const auto scratch = at::empty({scatter_add_rows_scratch(num_pairs, num_rows)}, in.row_N.options());
        PairsByRow pairs;
        C10_CUDA_CHECK(launch_pairs_by_row(row, offset + num_groups, num_pairs, num_rows,
                                           scratch.mutable_data_ptr<int32_t>(), &pairs, stream));
        const experts::PairSumArguments sum{.y = bf16_data(y_ND),
                                            .row_begins = pairs.row_begin,
                                            .pairs = pairs.pair,
                                            .out = bf16_data(out_RD),
                                            .num_rows = static_cast<int>(num_rows),
                                            .width = static_cast<int>(in.width())};
        C10_CUDA_CHECK(experts::launch_pair_sum(sum, stream));
    }
};

// The gradients of one call, once its dH is there.
struct Backward {
    const Call& call;
    at::Tensor dy_RD;
    SlotLists lists;

    Backward(const Call& given, const at::Tensor& dy)
        : call(given), dy_RD(aligned(dy)), lists(call.in.slot_E, call.in.num_slots(), call.stream) {}

    // dH and A from H; returns the gradient of the routing weights. dh may be h.
    at::Tensor hidden_grad(const at::Tensor& h, const at::Tensor& dh, const at::Tensor& a_NF) const {
        const ExpertMlp& in = call.in;
        const int num_parts = call.kernels.num_weight_grad_parts(in.hidden());
        const auto parts = at::empty({num_parts, call.num_pairs}, in.weight_N.options());
        const experts::HiddenGrad grad{.product = call.product(dy_RD, true, in.w_out, in.hidden(), in.width()),
                                       .h = bf16_data(h),
                                       .h_stride = row_stride(h),
                                       .dh = bf16_data(dh),
                                       .dh_stride = row_stride(dh),
                                       .a = bf16_data(a_NF),
                                       .weight = call.weight,
                                       .weight_grad = parts.mutable_data_ptr<float>(),
                                       .num_pairs = call.num_pairs,
                                       .activation = call.activation()};
        C10_CUDA_CHECK(call.kernels.hidden_grad(grad, call.num_blocks, call.stream));

        auto dweight_N = at::empty(in.weight_N.sizes(), in.weight_N.options());
        const experts::WeightGradArguments sum{.parts = parts.const_data_ptr<float>(),
                                               .out = dweight_N.mutable_data_ptr<float>(),
                                               .num_parts = num_parts,
                                               .num_pairs = static_cast<int>(call.num_pairs),
                                               .group_offsets = call.offset,
                                               .num_groups = static_cast<int>(call.num_groups),
                                               .bias = in.b_out ? bf16_data(*in.b_out) : nullptr,
                                               .bias_stride = in.b_out ? in.b_out->stride(0) : 0,
                                               .slots = data_or_null<int32_t>(in.slot_E),
                                               .dy = bf16_data(dy_RD),
                                               .dy_stride = row_stride(dy_RD),
                                               .row_indices = call.row,
                                               .width = static_cast<int>(in.width())};
        C10_CUDA_CHECK(experts::launch_weight_grad(sum, call.stream));
        return dweight_N;
    }

    VarlenKProblem::Operand operand(const at::Tensor& rows, bool gathers) const {
        return varlen_k_operand(rows, gathers ? call.row : nullptr);
    }

    void sum_over_pairs(const VarlenKProblem::Operand& a, const VarlenKProblem::Operand& b,
                        const at::Tensor& out) const {
        const VarlenKProblem problem{.a = a,
                                     .b = b,
                                     .group_offsets = call.offset,
                                     .slot_offsets = lists.offsets(),
                                     .slot_groups = lists.groups(),
                                     .num_slots = call.in.num_slots()};
        C10_CUDA_CHECK(call.kernels.varlen_k_gemm(problem, bf16_data(out), call.num_blocks, call.stream));
    }

    // With `gathers`, of the rows that row_N names, weighted.
    void sum_bias(const at::Tensor& rows, bool gathers, const at::Tensor& out) const {
        const experts::SlotSumArguments sum{.data = bf16_data(rows),
                                            .data_stride = row_stride(rows),
                                            .row_indices = gathers ? call.row : nullptr,
                                            .weight = gathers ? call.weight : nullptr,
                                            .group_offsets = call.offset,
                                            .slot_offsets = lists.offsets(),
                                            .slot_groups = lists.groups(),
                                            .out = bf16_data(out),
                                            .num_slots = static_cast<int>(call.in.num_slots()),
                                            .width = static_cast<int>(rows.size(1))};
        C10_CUDA_CHECK(experts::launch_slot_sum(sum, call.stream));
    }

    void input_grad(const at::Tensor& dh, const at::Tensor& dx_RD) const {
        const auto dx_ND = call.pair_rows(call.in.width());
        const GroupedGemmProblem problem = call.product(dh, false, call.in.w_in, call.in.width(), call.columns);
        C10_CUDA_CHECK(
            call.kernels.grouped_gemm_mn_major(problem, {.out = bf16_data(dx_ND)}, call.num_blocks, call.stream));
        call.sum_pairs(dx_ND, dx_RD);
    }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> expert_mlp_cuda(const ExpertMlp& in, bool save_h) {
    check_expert_mlp(in);
    const c10::cuda::CUDAGuard guard(in.x_RD.device());
    check_values_if_debugging(in);
    const Call call(in);
    auto h_NP = save_h ? call.pair_rows(in.hidden_columns()) : at::empty({0}, in.x_RD.options());
    if (!call.has_work()) return {at::zeros(in.x_RD.sizes(), in.x_RD.options()), h_NP};

    const auto a_NF = call.pair_rows(in.hidden());
    call.project_up(save_h ? bf16_data(h_NP) : nullptr, in.hidden_columns(), bf16_data(a_NF));
    const auto y_ND = call.pair_rows(in.width());
    const gemm::RowStore store{.out = bf16_data(y_ND),
                               .bias = in.b_out ? bf16_data(*in.b_out) : nullptr,
                               .bias_stride = in.b_out ? in.b_out->stride(0) : 0,
                               .weight = call.weight};
    C10_CUDA_CHECK(call.kernels.grouped_gemm(call.product(a_NF, false, in.w_out, in.width(), in.hidden()), store,
                                             call.num_blocks, call.stream));
    auto y_RD = at::empty(in.x_RD.sizes(), in.x_RD.options());
    call.sum_pairs(y_ND, y_RD);
    return {y_RD, h_NP};
}

ExpertMlpGradients expert_mlp_backward_cuda(const at::Tensor& dy_RD, ExpertMlpTensors tensors,
                                            const OptionalTensor& h_NP, std::string_view activation) {
    const ExpertMlp in{std::move(tensors), activation};
    check_expert_mlp_backward(in, dy_RD, h_NP);
    const c10::cuda::CUDAGuard guard(in.x_RD.device());
    check_values_if_debugging(in);
    const Call call(in);
    const auto options = in.x_RD.options();
    if (!call.has_work())
        return {at::zeros(in.x_RD.sizes(), options),   at::zeros(in.weight_N.sizes(), in.weight_N.options()),
                at::zeros(in.w_in.sizes(), options),   at::zeros(in.w_out.sizes(), options),
                gradient_of(in.b_in, options).zero_(), gradient_of(in.b_out, options).zero_()};

    const Backward backward(call, dy_RD);
    auto dh = call.pair_rows(call.columns);
    if (!h_NP) call.project_up(bf16_data(dh), call.columns, nullptr);
    auto a_NF = call.pair_rows(in.hidden());
    auto dweight_N = backward.hidden_grad(h_NP ? *h_NP : dh, dh, a_NF);

    auto dw_out = at::empty(in.w_out.sizes(), options);
    backward.sum_over_pairs(backward.operand(backward.dy_RD, true), backward.operand(a_NF, false), dw_out);
    a_NF.reset();
    auto dw_in = at::empty(in.w_in.sizes(), options);
    backward.sum_over_pairs(backward.operand(dh, false), backward.operand(call.x_RD, true), dw_in);
    auto db_in = gradient_of(in.b_in, options);
    auto db_out = gradient_of(in.b_out, options);
    if (in.b_in) backward.sum_bias(dh, false, db_in);
    if (in.b_out) backward.sum_bias(backward.dy_RD, true, db_out);
    auto dx_RD = at::empty(in.x_RD.sizes(), options);
    backward.input_grad(dh, dx_RD);
    return {dx_RD, dweight_N, dw_in, dw_out, db_in, db_out};
}

TORCH_LIBRARY_IMPL(moetrain, CUDA, m) {
    m.impl("expert_mlp_kernels", boxed::kernel<&expert_mlp_cuda>());
    m.impl("expert_mlp_kernels_backward", boxed::kernel<&expert_mlp_backward_cuda>());
}

}  // namespace moetrain
