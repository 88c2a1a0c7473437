#include "ops/planner/check_sequence_plan.h"
#include "planner/sequences/check.h"

namespace moetrain {
namespace {

void check_plan_array(const char* name, const at::Tensor& x, at::ScalarType dtype, at::IntArrayRef sizes,
                      const char* shape) {
    constexpr auto kOp = "SequencePlan";
    check_dtype(kOp, name, x, dtype);
    check_sizes(kOp, name, x, sizes, shape);
    check_contiguous(kOp, name, x);
}

}  // namespace

void check_sequence_plan_cpu(const SequencePlanTensors& in, int64_t block, int64_t capacity, int64_t num_layers) {
    const int64_t num_items = in.round_I.numel(), num_sequences = in.sequence_N3.size(0);
    check_plan_array("sequence", in.sequence_N3, at::kLong, {num_sequences, 3}, "[N, 3]");
    check_plan_array("round", in.round_I, at::kInt, {num_items}, "[I]");
    check_plan_array("offset", in.offset_I1, at::kLong, {num_items + 1}, "[I + 1]");
    check_plan_array("member", in.member_N, at::kInt, {num_sequences}, "[N]");
    check_plan_array("rank_offset", in.rank_offset_I1, at::kLong, {num_items + 1}, "[I + 1]");
    check_plan_array("rank", in.rank_M, at::kInt, {in.rank_M.numel()}, "[M]");
    check_plan_array("offload", in.offload_I, at::kDouble, {num_items}, "[I]");
    check_plan_array("est_ms", in.est_ms_I, at::kDouble, {num_items}, "[I]");
    check_plan_array("rounds", in.rounds_R, at::kInt, {in.rounds_R.numel()}, "[R]");
    const std::string broken = planner::broken_rule({
        .sequence_N3 = in.sequence_N3.const_data_ptr<int64_t>(),
        .num_sequences = num_sequences,
        .round_I = in.round_I.const_data_ptr<int32_t>(),
        .offset_I1 = in.offset_I1.const_data_ptr<int64_t>(),
        .member_N = in.member_N.const_data_ptr<int32_t>(),
        .rank_offset_I1 = in.rank_offset_I1.const_data_ptr<int64_t>(),
        .rank_M = in.rank_M.const_data_ptr<int32_t>(),
        .offload_I = in.offload_I.const_data_ptr<double>(),
        .est_ms_I = in.est_ms_I.const_data_ptr<double>(),
        .num_items = num_items,
        .num_item_ranks = in.rank_M.numel(),
        .rounds_R = in.rounds_R.const_data_ptr<int32_t>(),
        .num_ranks = in.rounds_R.numel(),
        .block = block,
        .capacity = capacity,
        .num_layers = num_layers,
    });
    TORCH_CHECK_VALUE(broken.empty(), "SequencePlan: ", broken);
}

}  // namespace moetrain
