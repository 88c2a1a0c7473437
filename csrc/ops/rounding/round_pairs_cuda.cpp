// With debugging on, the CPU checks copies of what comes in, which waits for the device.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/rounding/offer_pairs.h"
#include "cuda/rounding/round_pairs.h"
#include "ops/common/cuda.h"
#include "ops/rounding/round_pairs.h"

namespace moetrain {
namespace {

void check_cuda_tile(const char* op, int64_t tile) {
    check_tile(op, tile);
    TORCH_CHECK_VALUE(tile <= kMaxTileToRound, op, ": tile must be at most ", kMaxTileToRound, " on CUDA, got ", tile,
                      "; move the tensors to the CPU");
}

template <typename Acc>
void run_offer(const at::Tensor& score_TE, const at::Tensor& token_N, const at::Tensor& offset_E1,
               const at::Tensor& token_gid_T2, const OptionalTensor& valid_T, int64_t tile, const at::Tensor& offers_EX,
               const at::Tensor& offer_token_E2M) {
    const OfferInput<Acc> in{
        .pairs = pairs_of(score_TE, token_N, offset_E1),
        .score_TE = score_TE.const_data_ptr<Acc>(),
        .stride = score_TE.stride(0),
        .token_gid_T2 = token_gid_T2.const_data_ptr<int64_t>(),
        .valid_T = data_or_null<bool>(valid_T),
        .tile = tile,
    };
    const int64_t bytes = offer_pairs_scratch_bytes(score_TE.size(0), score_TE.size(1), tile, sizeof(Acc));
    const auto scratch = at::empty({bytes}, token_N.options().dtype(at::kByte));
    C10_CUDA_CHECK(launch_offer_pairs(in, offers_EX.mutable_data_ptr<int64_t>(),
                                      offer_token_E2M.mutable_data_ptr<int32_t>(), scratch.mutable_data_ptr(),
                                      c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> offer_pairs_cuda(const at::Tensor& score_TE, const at::Tensor& token_N,
                                                    const at::Tensor& offset_E1, const at::Tensor& token_gid_T2,
                                                    const OptionalTensor& valid_T, int64_t tile) {
    constexpr auto op = "offer_pairs";
    check_cuda_tile(op, tile);
    check_scored_pairs(op, score_TE, token_N, offset_E1);
    check_token_ids(op, score_TE, token_gid_T2, valid_T);
    const c10::cuda::CUDAGuard guard(score_TE.device());
    if (debug_checks())
        offer_pairs_cpu(score_TE.cpu(), token_N.cpu(), offset_E1.cpu(), token_gid_T2.cpu(), on_cpu(valid_T), tile);
    const int64_t num_experts = score_TE.size(1);
    auto offers_EX = at::empty({num_experts, OfferRow::size(tile)}, token_gid_T2.options());
    auto offer_token_E2M = at::empty({num_experts, 2, tile}, token_N.options());
    const auto run = score_TE.scalar_type() == at::kDouble ? run_offer<double> : run_offer<float>;
    run(score_TE, token_N, offset_E1, token_gid_T2, valid_T, tile, offers_EX, offer_token_E2M);
    return {offers_EX, offer_token_E2M};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> round_pairs_cuda(
    const at::Tensor& score_TE, const at::Tensor& token_N, const at::Tensor& offset_E1, const at::Tensor& offers_WEX,
    const at::Tensor& offer_token_E2M, const OptionalTensor& holder_WE, int64_t rank, int64_t tile,
    std::string_view rule, int64_t key) {
    constexpr auto op = "round_pairs";
    check_cuda_tile(op, tile);
    const RoundRule parsed = parse_round_rule(rule);
    check_scored_pairs(op, score_TE, token_N, offset_E1);
    check_offers(score_TE, offers_WEX, offer_token_E2M, holder_WE, rank, tile);
    const int64_t world = offers_WEX.size(0), num_experts = score_TE.size(1);
    TORCH_CHECK_VALUE(world <= kMaxWorldToRound, op, ": offers must be of at most ", kMaxWorldToRound,
                      " ranks on CUDA, got ", world);
    const c10::cuda::CUDAGuard guard(score_TE.device());
    if (debug_checks())
        round_pairs_cpu(score_TE.cpu(), token_N.cpu(), offset_E1.cpu(), offers_WEX.cpu(), offer_token_E2M.cpu(),
                        on_cpu(holder_WE), rank, tile, rule, key);
    const RoundInput in =
        round_input(score_TE, token_N, offset_E1, offers_WEX, offer_token_E2M, holder_WE, rank, tile, parsed, key);
    const int64_t capacity = rounded_capacity(score_TE, token_N, tile, parsed);
    auto token_P = at::empty({capacity}, token_N.options());
    auto source_P = at::empty({capacity}, token_N.options());
    auto rounded_E1 = at::empty({num_experts + 1}, offset_E1.options());
    auto added_E = at::empty({num_experts}, offers_WEX.options());
    auto dropped_E = at::empty({num_experts}, offers_WEX.options());
    const auto scratch = at::empty({round_pairs_scratch_size(num_experts, world)}, offers_WEX.options());
    const RoundOutput out = round_output(token_P, source_P, rounded_E1, added_E, dropped_E);
    C10_CUDA_CHECK(launch_round_pairs(in, out, scratch.mutable_data_ptr<int64_t>(), c10::cuda::getCurrentCUDAStream()));
    return {token_P, source_P, rounded_E1, added_E, dropped_E};
}

TORCH_LIBRARY_IMPL(moetrain, CUDA, m) {
    m.impl("offer_pairs", &offer_pairs_cuda);
    m.impl("round_pairs", &round_pairs_cuda);
}

}  // namespace moetrain
