#include <string>

#include "cpu/rounding/round_pairs.h"
#include "ops/common/optional.h"
#include "ops/common/tensors.h"
#include "ops/rounding/round_pairs.h"

namespace moetrain {
namespace {

PairList checked_pairs(const char* op, const ScoredPairs& in) {
    const PairList pairs = pairs_of(in);
    const int64_t bad = first_unordered_expert(pairs);
    TORCH_CHECK_VALUE(bad < 0, op, ": tokens of each expert must ascend strictly within [0, ", pairs.num_tokens,
                      ") and offsets within [0, ", pairs.capacity, "], but expert ", bad,
                      " breaks that; give the pairs as group_pairs orders them");
    return pairs;
}

void check_offers_of_list(const RoundInput& in, const at::Tensor& score_TE) {
    const int64_t stride = score_TE.stride(0);
    const OfferFault fault = in.is_double ? first_offer_fault(in, score_TE.const_data_ptr<double>(), stride)
                                          : first_offer_fault(in, score_TE.const_data_ptr<float>(), stride);
    if (fault.must == nullptr) return;
    TORCH_CHECK_VALUE(false, "round_pairs: in the offers of rank ", fault.rank, " to expert ", fault.expert, " ",
                      fault.must, fault.limit < 0 ? std::string() : std::to_string(fault.limit), ", got ", fault.got,
                      "; give what offer_pairs made of these very scores and pairs, and as rank (here ", in.rank,
                      ") this rank's own index among the offers");
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> offer_pairs_cpu(const ScoredPairs& in, const at::Tensor& token_gid_T2,
                                                   const OptionalTensor& valid_T, int64_t tile) {
    constexpr auto op = "offer_pairs";
    check_tile(op, tile);
    check_scored_pairs(op, in);
    check_token_ids(op, in.score_TE, token_gid_T2, valid_T);
    const PairList pairs = checked_pairs(op, in);
    auto offers_EX = new_zeros({pairs.num_experts, OfferRow::size(tile)}, token_gid_T2.options());
    auto offer_token_E2M = new_zeros({pairs.num_experts, 2, tile}, in.token_N.options());
    auto* const offers = offers_EX.mutable_data_ptr<int64_t>();
    auto* const offer_token = offer_token_E2M.mutable_data_ptr<int32_t>();
    if (in.score_TE.scalar_type() == at::kDouble) {
        offer_pairs_kernel(offer_input<double>(in, token_gid_T2, valid_T, tile), offers, offer_token);
    } else {
        offer_pairs_kernel(offer_input<float>(in, token_gid_T2, valid_T, tile), offers, offer_token);
    }
    return {offers_EX, offer_token_E2M};
}

RoundOutputs round_pairs_cpu(const ScoredPairs& given, const GroupOffers& offers, int64_t tile, std::string_view rule,
                             int64_t key) {
    constexpr auto op = "round_pairs";
    check_tile(op, tile);
    const RoundRule parsed = parse_round_rule(rule);
    check_scored_pairs(op, given);
    check_offers(given.score_TE, offers, tile);
    checked_pairs(op, given);
    const RoundInput in = round_input(given, offers, tile, parsed, key);
    check_offers_of_list(in, given.score_TE);
    const int64_t capacity = rounded_capacity(given, tile, parsed);
    auto token_P = new_empty({capacity}, given.token_N.options());
    auto source_P = new_empty({capacity}, given.token_N.options());
    auto rounded_E1 = new_empty({in.pairs.num_experts + 1}, given.offset_E1.options());
    auto added_E = new_empty({in.pairs.num_experts}, offers.offers_WEX.options());
    auto dropped_E = new_empty({in.pairs.num_experts}, offers.offers_WEX.options());
    round_pairs_kernel(in, round_output(token_P, source_P, rounded_E1, added_E, dropped_E));
    return {token_P, source_P, rounded_E1, added_E, dropped_E};
}

}  // namespace moetrain
