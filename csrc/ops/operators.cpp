// The operators: what each is called with, and what runs on the CPU; what runs on CUDA is registered in X_cuda.cpp. On
// the CPU no other file includes torch's large headers, so what needs them is here too: common/tensors.h.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "ops/attention/attend.h"
#include "ops/attention/causal_attention.h"
#include "ops/chunks/chunks.h"
#include "ops/common/boxed.h"
#include "ops/common/tensors.h"
#include "ops/expert_mlp/expert_mlp.h"
#include "ops/grouped_gemm/grouped_gemm.h"
#include "ops/grouped_gemm/grouped_gemm_varlen_k.h"
#include "ops/norm/rms_norm.h"
#include "ops/norm/rotate.h"
#include "ops/planner/check_sequence_plan.h"
#include "ops/planner/plan_placements.h"
#include "ops/planner/plan_sequences.h"
#include "ops/rounding/round_pairs.h"
#include "ops/routing/assign_seats.h"
#include "ops/routing/group_pairs.h"
#include "ops/routing/route.h"
#include "ops/routing/select_experts.h"
#include "ops/rows/gather_rows.h"
#include "ops/rows/plan_rows.h"
#include "ops/rows/scatter_add_rows.h"

namespace moetrain {

at::Tensor new_empty(at::IntArrayRef sizes, const at::TensorOptions& options) { return at::empty(sizes, options); }
at::Tensor new_empty_like(const at::Tensor& like) { return at::empty_like(like); }
at::Tensor new_zeros(at::IntArrayRef sizes, const at::TensorOptions& options) { return at::zeros(sizes, options); }
void multiply_into(at::Tensor& c, const at::Tensor& a, const at::Tensor& b) { at::mm_out(c, a, b); }

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
    m.def(
        "assign_seats(Tensor token_N, Tensor offset_E1, int num_tokens, Tensor seat_offset_E1, Tensor holder_Z, "
        "Tensor share_Z, int num_groups, int source, int domain_size) -> (Tensor, Tensor)");
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
        "causal_attention(Tensor q_THd, Tensor k_TGd, Tensor v_TGd, Tensor first_T, Tensor offset_R1, float scale) -> "
        "(Tensor, Tensor)");
    m.def(
        "causal_attention_backward(Tensor dy_THd, Tensor q_THd, Tensor k_TGd, Tensor v_TGd, Tensor y_THd, "
        "Tensor lse_HT, Tensor first_T, Tensor offset_R1, float scale) -> (Tensor, Tensor, Tensor)");
    m.def(
        "attend_(Tensor(a!) out_QHd, Tensor(b!) lse_HQ, Tensor q_QHd, Tensor k_KGd, Tensor v_KGd, Tensor range_q_S2, "
        "Tensor range_k_S2, bool causal, float scale) -> ()");
    m.def(
        "attend_backward_(Tensor(a!) dq_QHd, Tensor(b!) dk_KGd, Tensor(c!) dv_KGd, Tensor dout_QHd, Tensor q_QHd, "
        "Tensor k_KGd, Tensor v_KGd, Tensor out_QHd, Tensor lse_HQ, Tensor range_q_S2, Tensor range_k_S2, bool causal, "
        "float scale) -> ()");
    m.def(
        "check_attend(Tensor out_QHd, Tensor lse_HQ, Tensor q_QHd, Tensor k_KGd, Tensor v_KGd, Tensor range_q_S2, "
        "Tensor range_k_S2, bool causal, float scale) -> ()");
    m.def(
        "check_attend_backward(Tensor dq_QHd, Tensor dk_KGd, Tensor dv_KGd, Tensor dout_QHd, Tensor q_QHd, "
        "Tensor k_KGd, Tensor v_KGd, Tensor out_QHd, Tensor lse_HQ, Tensor range_q_S2, Tensor range_k_S2, bool causal, "
        "float scale) -> ()");
    m.def("rms_norm(Tensor x, Tensor weight_D, float eps) -> (Tensor, Tensor)");
    m.def("rms_norm_backward(Tensor dy, Tensor x, Tensor weight_D, Tensor inv_rms) -> (Tensor, Tensor)");
    m.def("rotate(Tensor x_BSHd, Tensor cos_BSd, Tensor sin_BSd, bool inverse) -> Tensor");
    m.def("pack_chunks(Tensor source, Tensor table_N3, int size, ScalarType dtype) -> Tensor");
    m.def("unpack_chunks_(Tensor(a!) target, Tensor source, Tensor table_N3) -> ()");
    m.def(
        "plan_placements(Tensor count_LNE, Tensor owner_LE, int num_groups, int groups_per_node, str planner, "
        "int slots, int overlap_degree, int seed, float pair_s, float near_row_s, float far_row_s, float expert_s, "
        "float overlap_s) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "measure_placements(Tensor count_LNE, Tensor owner_LE, int num_groups, int groups_per_node, Tensor offset_LE1, "
        "Tensor holder_LZ, Tensor weight_LZ, Tensor affinity_L3) -> Tensor");
    m.def(
        "split_placements(Tensor count_LNE, Tensor owner_LE, int num_groups, int groups_per_node, Tensor offset_LE1, "
        "Tensor holder_LZ, Tensor weight_LZ, Tensor affinity_L3, float pair_s, float near_row_s, float far_row_s, "
        "float expert_s, float overlap_s) -> (Tensor, Tensor, Tensor)");
    m.def(
        "reshard_owners(Tensor count_LNE, Tensor owner_LE, int num_groups, int groups_per_node, int num_hot) -> "
        "Tensor");
    m.def(
        "plan_sequences(Tensor num_tokens_N, str planner, int num_ranks, int block, int capacity, int gang, "
        "bool equal_rounds, Tensor cost_10) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "check_sequence_plan(Tensor sequence_N3, Tensor round_I, Tensor offset_I1, Tensor member_N, "
        "Tensor rank_offset_I1, Tensor rank_M, Tensor offload_I, Tensor est_ms_I, Tensor rounds_R, int block, "
        "int capacity, int num_layers) -> ()");
    m.def("add_sources_(Tensor(a!) target, Tensor[] sources, Tensor table_N4) -> ()");
}

TORCH_LIBRARY_IMPL(moetrain, CPU, m) {
    m.impl("causal_attention", boxed::kernel<&causal_attention_cpu>());
    m.impl("causal_attention_backward", boxed::kernel<&causal_attention_backward_cpu>());
    m.impl("attend_", boxed::kernel<&attend_cpu>());
    m.impl("attend_backward_", boxed::kernel<&attend_backward_cpu>());
    m.impl("pack_chunks", boxed::kernel<&pack_chunks_cpu>());
    m.impl("unpack_chunks_", boxed::kernel<&unpack_chunks_cpu>());
    m.impl("plan_placements", boxed::kernel<&plan_placements_cpu>());
    m.impl("split_placements", boxed::kernel<&split_placements_cpu>());
    m.impl("reshard_owners", boxed::kernel<&reshard_owners_cpu>());
    m.impl("plan_sequences", boxed::kernel<&plan_sequences_cpu>());
    m.impl("check_sequence_plan", boxed::kernel<&check_sequence_plan_cpu>());
    m.impl("measure_placements", boxed::kernel<&measure_placements_cpu>());
    m.impl("add_sources_", boxed::kernel<&add_sources_cpu>());
    m.impl("expert_mlp", boxed::kernel<&expert_mlp_cpu>());
    m.impl("expert_mlp_backward", boxed::kernel<&expert_mlp_backward_cpu>());
    m.impl("grouped_gemm", boxed::kernel<&grouped_gemm_cpu>());
    m.impl("grouped_gemm_varlen_k", boxed::kernel<&grouped_gemm_varlen_k_cpu>());
    m.impl("grouped_gemm_varlen_k_", boxed::kernel<&grouped_gemm_varlen_k_accumulate_cpu>());
    m.impl("rms_norm", boxed::kernel<&rms_norm_cpu>());
    m.impl("rms_norm_backward", boxed::kernel<&rms_norm_backward_cpu>());
    m.impl("rotate", boxed::kernel<&rotate_cpu>());
    m.impl("offer_pairs", boxed::kernel<&offer_pairs_cpu>());
    m.impl("round_pairs", boxed::kernel<&round_pairs_cpu>());
    m.impl("assign_seats", boxed::kernel<&assign_seats_cpu>());
    m.impl("group_pairs", boxed::kernel<&group_pairs_cpu>());
    m.impl("route", boxed::kernel<&route_cpu>());
    m.impl("route_backward", boxed::kernel<&route_backward_cpu>());
    m.impl("select_experts", boxed::kernel<&select_experts_cpu>());
    m.impl("select_experts_backward", boxed::kernel<&select_experts_backward_cpu>());
    m.impl("gather_rows", boxed::kernel<&gather_rows_cpu>());
    m.impl("plan_sends", boxed::kernel<&plan_sends_cpu>());
    m.impl("plan_receives", boxed::kernel<&plan_receives_cpu>());
    m.impl("scatter_add_rows", boxed::kernel<&scatter_add_rows_cpu>());
}

TORCH_LIBRARY_IMPL(moetrain, CompositeExplicitAutograd, m) {
    m.impl("check_expert_mlp", boxed::kernel<&check_expert_mlp_op>());
    m.impl("check_attend", boxed::kernel<&check_attend_op>());
    m.impl("check_attend_backward", boxed::kernel<&check_attend_backward_op>());
}

}  // namespace moetrain
