// With debugging on, the CPU checks copies of what comes in, which waits for the device.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/rounding/offer_pairs.h"
#include "cuda/rounding/round_pairs.h"
#include "ops/common/boxed.h"
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
void run_offer(const OfferInput<Acc>& in, const at::Tensor& offers_EX, const at::Tensor& offer_token_E2M) {
    const int64_t bytes = offer_pairs_scratch_bytes(in.pairs.num_tokens, in.pairs.num_experts, in.tile, sizeof(Acc));
    const auto scratch = at::empty({bytes}, offer_token_E2M.options().dtype(at::kByte));
    C10_CUDA_CHECK(launch_offer_pairs(in, offers_EX.mutable_data_ptr<int64_t>(),
                                      offer_token_E2M.mutable_data_ptr<int32_t>(), scratch.mutable_data_ptr(),
                                      c10::cuda::getCurrentCUDAStream()));
}

ScoredPairs on_cpu(const ScoredPairs& in) { return {in.score_TE.cpu(), in.token_N.cpu(), in.offset_E1.cpu()}; }
GroupOffers on_cpu(const GroupOffers& offers) {
    return {offers.offers_WEX.cpu(), offers.offer_token_E2M.cpu(), moetrain::on_cpu(offers.holder_WE), offers.rank};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> offer_pairs_cuda(const ScoredPairs& in, const at::Tensor& token_gid_T2,
                                                    const OptionalTensor& valid_T, int64_t tile) {
    constexpr auto op = "offer_pairs";
    check_cuda_tile(op, tile);
    check_scored_pairs(op, in);
    check_token_ids(op, in.score_TE, token_gid_T2, valid_T);
    const c10::cuda::CUDAGuard guard(in.score_TE.device());
    if (debug_checks()) offer_pairs_cpu(on_cpu(in), token_gid_T2.cpu(), moetrain::on_cpu(valid_T), tile);
    const int64_t num_experts = in.score_TE.size(1);
    auto offers_EX = at::empty({num_experts, OfferRow::size(tile)}, token_gid_T2.options());
    auto offer_token_E2M = at::empty({num_experts, 2, tile}, in.token_N.options());
    if (in.score_TE.scalar_type() == at::kDouble) {
        run_offer(offer_input<double>(in, token_gid_T2, valid_T, tile), offers_EX, offer_token_E2M);
    } else {
        run_offer(offer_input<float>(in, token_gid_T2, valid_T, tile), offers_EX, offer_token_E2M);
    }
    return {offers_EX, offer_token_E2M};
}

RoundOutputs round_pairs_cuda(const ScoredPairs& given, const GroupOffers& offers, int64_t tile, std::string_view rule,
                              int64_t key) {
    constexpr auto op = "round_pairs";
    check_cuda_tile(op, tile);
    const RoundRule parsed = parse_round_rule(rule);
    check_scored_pairs(op, given);
    check_offers(given.score_TE, offers, tile);
    const int64_t world = offers.offers_WEX.size(0), num_experts = given.score_TE.size(1);
    TORCH_CHECK_VALUE(world <= kMaxWorldToRound, op, ": offers must be of at most ", kMaxWorldToRound,
                      " ranks on CUDA, got ", world);
    const c10::cuda::CUDAGuard guard(given.score_TE.device());
    if (debug_checks()) round_pairs_cpu(on_cpu(given), on_cpu(offers), tile, rule, key);
    const RoundInput in = round_input(given, offers, tile, parsed, key);
    const int64_t capacity = rounded_capacity(given, tile, parsed);
    const auto counters = offers.offers_WEX.options();
    auto token_P = at::empty({capacity}, given.token_N.options());
    auto source_P = at::empty({capacity}, given.token_N.options());
    auto rounded_E1 = at::empty({num_experts + 1}, given.offset_E1.options());
    auto added_E = at::empty({num_experts}, counters);
    auto dropped_E = at::empty({num_experts}, counters);
    const auto scratch = at::empty({round_pairs_scratch_size(num_experts, world)}, counters);
    const RoundOutput out = round_output(token_P, source_P, rounded_E1, added_E, dropped_E);
    C10_CUDA_CHECK(launch_round_pairs(in, out, scratch.mutable_data_ptr<int64_t>(), c10::cuda::getCurrentCUDAStream()));
    return {token_P, source_P, rounded_E1, added_E, dropped_E};
}

TORCH_LIBRARY_IMPL(moetrain, CUDA, m) {
    m.impl("offer_pairs", boxed::kernel<&offer_pairs_cuda>());
    m.impl("round_pairs", boxed::kernel<&round_pairs_cuda>());
}

}  // namespace moetrain
