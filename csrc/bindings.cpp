// Op schemas and the Python module: the only file that knows Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/library.h>

#include "cpu/isa/isa.h"

TORCH_LIBRARY(moetrain, m) {
    m.def(
        "select_experts(Tensor logits_TE, int top_k, str score, Tensor? bias_E, int num_null, int num_groups, "
        "int groups_kept, str group_rule, bool renormalise, float scale, Tensor? valid_T, Tensor? segment_T, "
        "int num_segments) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "select_experts_backward(Tensor dweight_TK, Tensor dprob_sum_GE, Tensor logits_TE, Tensor expert_id_TK, "
        "str score, int num_null, bool renormalise, float scale, Tensor? valid_T, Tensor? segment_T) -> Tensor");
    m.def(
        "route(Tensor logits_TE, int top_k, str score, Tensor? bias_E, int num_null, int num_groups, "
        "int groups_kept, str group_rule, bool renormalise, float scale, Tensor? valid_T, Tensor? segment_T, "
        "int num_segments) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "route_backward(Tensor dweight_N, Tensor dprob_sum_GE, Tensor logits_TE, Tensor expert_id_TK, "
        "Tensor place_TK, str score, int num_null, bool renormalise, float scale, Tensor? valid_T, "
        "Tensor? segment_T) -> Tensor");
    m.def("group_pairs(Tensor expert_id_P, int num_experts) -> (Tensor, Tensor)");
    m.def(
        "plan_sends(Tensor token_N, Tensor offset_E1, Tensor rank_E, Tensor local_E, Tensor bad_1, int num_tokens, "
        "int num_ranks, int max_local) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def("plan_receives(Tensor row_P, Tensor counts_WK, int num_local) -> (Tensor, Tensor, Tensor)");
    m.def("gather_rows(Tensor x_TD, Tensor row_N, Tensor? offset_E1) -> Tensor");
    m.def("scatter_add_rows(Tensor y_ND, Tensor row_N, Tensor? weight_N, Tensor? offset_E1, int num_rows) -> Tensor");
    m.def(
        "grouped_gemm(Tensor a_MK, Tensor b_SNK, Tensor offset_E1, Tensor? slot_E, Tensor? row_M, bool b_is_kn) -> "
        "Tensor");
    m.def(
        "grouped_gemm_varlen_k(Tensor a_MI, Tensor b_MJ, Tensor offset_E1, Tensor? slot_E, Tensor? row_a_M, "
        "Tensor? row_b_M, int num_slots) -> Tensor");
    m.def(
        "grouped_gemm_varlen_k_(Tensor(a!) out_SIJ, Tensor a_MI, Tensor b_MJ, Tensor offset_E1, Tensor? slot_E, "
        "Tensor? row_a_M, Tensor? row_b_M) -> ()");
    // What bf16 on CUDA lacks for tensor cores, so that simple kernels multiply though nobody asked for them; or "".
    m.def(
        "grouped_gemm_obstacle(Tensor a_MK, Tensor b_SNK, Tensor offset_E1, Tensor? slot_E, Tensor? row_M, "
        "bool b_is_kn) -> str");
    m.def(
        "grouped_gemm_varlen_k_obstacle(Tensor a_MI, Tensor b_MJ, Tensor offset_E1, Tensor? slot_E, Tensor? row_a_M, "
        "Tensor? row_b_M, int num_slots, Tensor? out_SIJ) -> str");
    m.def(
        "expert_mlp(Tensor x_RD, Tensor row_N, Tensor weight_N, Tensor offset_E1, Tensor w_in, Tensor w_out, "
        "Tensor? slot_E, Tensor? b_in, Tensor? b_out, str activation, bool save_h) -> (Tensor, Tensor)");
    m.def(
        "expert_mlp_backward(Tensor dy_RD, Tensor x_RD, Tensor row_N, Tensor weight_N, Tensor offset_E1, "
        "Tensor w_in, Tensor w_out, Tensor? slot_E, Tensor? b_in, Tensor? b_out, Tensor? h, str activation) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    // On CUDA expert_mlp is a choice, made in Python, between these and other operators.
    m.def(
        "expert_mlp_kernels(Tensor x_RD, Tensor row_N, Tensor weight_N, Tensor offset_E1, Tensor w_in, Tensor w_out, "
        "Tensor? slot_E, Tensor? b_in, Tensor? b_out, str activation, bool save_h) -> (Tensor, Tensor)");
    m.def(
        "expert_mlp_kernels_backward(Tensor dy_RD, Tensor x_RD, Tensor row_N, Tensor weight_N, Tensor offset_E1, "
        "Tensor w_in, Tensor w_out, Tensor? slot_E, Tensor? b_in, Tensor? b_out, Tensor? h, str activation) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "check_expert_mlp(Tensor x_RD, Tensor row_N, Tensor weight_N, Tensor offset_E1, Tensor w_in, Tensor w_out, "
        "Tensor? slot_E, Tensor? b_in, Tensor? b_out, str activation) -> ()");
    m.def(
        "offer_pairs(Tensor score_TE, Tensor token_N, Tensor offset_E1, Tensor token_gid_T2, Tensor? valid_T, "
        "int tile) -> (Tensor, Tensor)");
    m.def(
        "round_pairs(Tensor score_TE, Tensor token_N, Tensor offset_E1, Tensor offers_WEX, Tensor offer_token_E2M, "
        "Tensor? holder_WE, int rank, int tile, str rule, int key) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "causal_attention(Tensor q_BSHd, Tensor k_BSGd, Tensor v_BSGd, Tensor first_BS, float scale) -> "
        "(Tensor, Tensor)");
    m.def(
        "causal_attention_backward(Tensor dy_BSHd, Tensor q_BSHd, Tensor k_BSGd, Tensor v_BSGd, Tensor y_BSHd, "
        "Tensor lse_BHS, Tensor first_BS, float scale) -> (Tensor, Tensor, Tensor)");
    m.def("rms_norm(Tensor x, Tensor weight_D, float eps) -> (Tensor, Tensor)");
    m.def("rms_norm_backward(Tensor dy, Tensor x, Tensor weight_D, Tensor inv_rms) -> (Tensor, Tensor)");
    m.def("rotate(Tensor x_BSHd, Tensor cos_BSd, Tensor sin_BSd, bool inverse) -> Tensor");
    m.def("pack_chunks(Tensor source, Tensor table_N3, int size, ScalarType dtype) -> Tensor");
    m.def("unpack_chunks_(Tensor(a!) target, Tensor source, Tensor table_N3) -> ()");
    m.def("add_sources_(Tensor(a!) target, Tensor[] sources, Tensor table_N4) -> ()");
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.doc() = "Native part of moetrain: tensor ops live in torch.ops.moetrain.";
    m.attr("has_cuda") =
#ifdef MOETRAIN_WITH_CUDA
        true;
#else
        false;
#endif
    m.def("cpu_isas", &moetrain::isa::usable_isas, "Instruction sets that expert_mlp can use here, best first.");
    m.def("built_isas", &moetrain::isa::built_isas, "Those that are compiled in, whatever the machine, best first.");
    m.def("machine_isas", &moetrain::isa::machine_isas, "Those that the machine can run, compiled in or not.");
    m.def("gemm_ceiling", &moetrain::isa::gemm_ceiling, "TFLOP/s that one thread's tile products reach in cache.");
    m.def("cpu_isa", &moetrain::isa::isa_in_use, "The one in use: MOETRAIN_CPU_ISA, or the best.");
    m.def("kernel_isa", &moetrain::isa::kernel_isa, "What the kernels that run for a dtype say they are compiled for.");
}
