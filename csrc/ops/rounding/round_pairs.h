// Contract of offer_pairs and round_pairs: rows per expert become multiples of a tile (SonicMoE, 2512.14080).
//
// Tokens are ranked per expert on (chosen, score, lower global id first); a rule turns the number of chosen rows into a
// neighbouring multiple of the tile, and that many of the ranking are kept. Where the ranks of a group send to one
// holder, the multiple is of their total: each rank offers its tokens at the margin, and all decide alike.
#pragma once
#include <string_view>
#include <tuple>

#include "common/round_pairs_math.h"
#include "ops/common/checks.h"
#include "ops/common/fields.h"
#include "ops/common/optional.h"

namespace moetrain {

// A list of pairs, by expert, and the scores that rank tokens.
struct ScoredPairs {
    at::Tensor score_TE;
    at::Tensor token_N;
    at::Tensor offset_E1;

    using Fields = FieldTypes<at::Tensor, at::Tensor, at::Tensor>;
};

// What the ranks of a group offer, and this rank's place among them.
struct GroupOffers {
    at::Tensor offers_WEX;
    at::Tensor offer_token_E2M;  // this rank's own tokens
    OptionalTensor holder_WE;
    int64_t rank;

    using Fields = FieldTypes<at::Tensor, at::Tensor, OptionalTensor, int64_t>;
};

inline RoundRule parse_round_rule(std::string_view name) {
    if (name == "nearest") return RoundRule::kNearest;
    if (name == "stochastic") return RoundRule::kStochastic;
    if (name == "nearest_score") return RoundRule::kNearestScore;
    if (name == "balance") return RoundRule::kBalance;
    if (name == "up") return RoundRule::kUp;
    TORCH_CHECK_VALUE(name == "down",
                      "round_pairs: rule must be 'nearest', 'stochastic', 'nearest_score', 'balance', 'up' or 'down', "
                      "got '",
                      name, "'");
    return RoundRule::kDown;
}

inline void check_tile(const char* op, int64_t tile) {
    constexpr int64_t kMaxTile = 1 << 16;
    TORCH_CHECK_VALUE(tile >= 1 && tile <= kMaxTile, op, ": tile must be between 1 and ", kMaxTile, ", got ", tile);
}

inline void check_scored_pairs(const char* op, const ScoredPairs& in) {
    const auto& [score_TE, token_N, offset_E1] = in;
    TORCH_CHECK_VALUE(score_TE.dim() == 2 && score_TE.size(1) >= 1, op, ": score must be [T, E] with E >= 1, got ",
                      score_TE.sizes());
    TORCH_CHECK_TYPE(score_TE.scalar_type() == at::kFloat || score_TE.scalar_type() == at::kDouble, op,
                     ": score must be float32 or float64, since narrower scores tie by rounding, got ",
                     score_TE.scalar_type(), "; compute it in float32");
    check_contiguous_rows(op, "score", score_TE);
    TORCH_CHECK_VALUE(token_N.dim() == 1, op, ": token must be [N], got ", token_N.sizes());
    check_dtype(op, "token", token_N, at::kInt);
    check_contiguous(op, "token", token_N);
    check_dtype(op, "offset", offset_E1, at::kInt);
    check_sizes(op, "offset", offset_E1, {score_TE.size(1) + 1}, "[E + 1]");
    check_contiguous(op, "offset", offset_E1);
    check_same_device(op, "token", token_N, "score", score_TE);
    check_same_device(op, "offset", offset_E1, "score", score_TE);
    check_fits_int32(op, "pairs and scores together", token_N.size(0) + score_TE.numel());
}

inline void check_token_ids(const char* op, const at::Tensor& score_TE, const at::Tensor& token_gid_T2,
                            const OptionalTensor& valid_T) {
    const int64_t num_tokens = score_TE.size(0);
    check_dtype(op, "token_gid", token_gid_T2, at::kLong);
    check_sizes(op, "token_gid", token_gid_T2, {num_tokens, 2}, "[T, 2]");
    check_contiguous(op, "token_gid", token_gid_T2);
    check_same_device(op, "token_gid", token_gid_T2, "score", score_TE);
    if (!valid_T) return;
    check_dtype(op, "valid", *valid_T, at::kBool);
    check_sizes(op, "valid", *valid_T, {num_tokens}, "[T]");
    check_contiguous(op, "valid", *valid_T);
    check_same_device(op, "valid", *valid_T, "score", score_TE);
}

inline void check_offers(const at::Tensor& score_TE, const GroupOffers& offers, int64_t tile) {
    const auto& [offers_WEX, offer_token_E2M, holder_WE, rank] = offers;
    constexpr auto op = "round_pairs";
    const int64_t num_experts = score_TE.size(1), world = offers_WEX.dim() == 3 ? offers_WEX.size(0) : 0;
    check_same_device(op, "offers", offers_WEX, "score", score_TE);
    check_dtype(op, "offers", offers_WEX, at::kLong);
    check_sizes(op, "offers", offers_WEX, {world, num_experts, OfferRow::size(tile)}, "[W, E, 4 + 6 tile]");
    check_contiguous(op, "offers", offers_WEX);
    check_same_device(op, "offer_token", offer_token_E2M, "score", score_TE);
    check_dtype(op, "offer_token", offer_token_E2M, at::kInt);
    check_sizes(op, "offer_token", offer_token_E2M, {num_experts, 2, tile}, "[E, 2, tile]");
    check_contiguous(op, "offer_token", offer_token_E2M);
    TORCH_CHECK_VALUE(rank >= 0 && rank < world, op, ": rank must be between 0 and W - 1 = ", world - 1, ", got ",
                      rank);
    if (!holder_WE) return;
    check_same_device(op, "holder", *holder_WE, "score", score_TE);
    check_dtype(op, "holder", *holder_WE, at::kInt);
    check_sizes(op, "holder", *holder_WE, {world, num_experts}, "[W, E]");
    check_contiguous(op, "holder", *holder_WE);
}

// Room that the rounded list needs: what there was, and the most that the rule may add to each expert here.
inline int64_t rounded_capacity(const ScoredPairs& in, int64_t tile, RoundRule rule) {
    const int64_t most = most_added(rule, tile), num_tokens = in.score_TE.size(0);
    return in.token_N.size(0) + in.score_TE.size(1) * (most < num_tokens ? most : num_tokens);
}

inline PairList pairs_of(const ScoredPairs& in) {
    return {
        .token = in.token_N.const_data_ptr<int32_t>(),
        .offset = in.offset_E1.const_data_ptr<int32_t>(),
        .num_tokens = in.score_TE.size(0),
        .num_experts = in.score_TE.size(1),
        .capacity = in.token_N.size(0),
    };
}

template <typename Acc>
OfferInput<Acc> offer_input(const ScoredPairs& in, const at::Tensor& token_gid_T2, const OptionalTensor& valid_T,
                            int64_t tile) {
    return {
        .pairs = pairs_of(in),
        .score_TE = in.score_TE.const_data_ptr<Acc>(),
        .stride = in.score_TE.stride(0),
        .token_gid_T2 = token_gid_T2.const_data_ptr<int64_t>(),
        .valid_T = data_or_null<bool>(valid_T),
        .tile = tile,
    };
}

inline RoundInput round_input(const ScoredPairs& in, const GroupOffers& offers, int64_t tile, RoundRule rule,
                              int64_t key) {
    return {
        .pairs = pairs_of(in),
        .offers_WEX = offers.offers_WEX.const_data_ptr<int64_t>(),
        .offer_token_E2M = offers.offer_token_E2M.const_data_ptr<int32_t>(),
        .holder_WE = data_or_null<int32_t>(offers.holder_WE),
        .world = offers.offers_WEX.size(0),
        .rank = offers.rank,
        .tile = tile,
        .rule = rule,
        .key = static_cast<uint64_t>(key),
        .is_double = in.score_TE.scalar_type() == at::kDouble,
    };
}

inline RoundOutput round_output(const at::Tensor& token_P, const at::Tensor& source_P, const at::Tensor& rounded_E1,
                                const at::Tensor& added_E, const at::Tensor& dropped_E) {
    return {
        .token = token_P.mutable_data_ptr<int32_t>(),
        .source = source_P.mutable_data_ptr<int32_t>(),
        .offset_E1 = rounded_E1.mutable_data_ptr<int32_t>(),
        .added_E = added_E.mutable_data_ptr<int64_t>(),
        .dropped_E = dropped_E.mutable_data_ptr<int64_t>(),
        .capacity = token_P.size(0),
    };
}

// (offers_EX int64, offer_token_E2M int32): what each expert would drop and admit first, see OfferRow; the tokens are
// this rank's own. Beyond a side's length both are 0.
std::tuple<at::Tensor, at::Tensor> offer_pairs_cpu(const ScoredPairs& in, const at::Tensor& token_gid_T2,
                                                   const OptionalTensor& valid_T, int64_t tile);

// (token_P, source_P, offset_E1, added_E, dropped_E). Of the pairs of expert e in the rounded list, tokens ascend;
// source is a pair's place in the list that came in, or N + t * E + e for a filler: an index into weights and scores
// laid end to end. Behind offset[-1] both are 0. Offers of a group come with this rank's own tokens and its place in
// the group, must be of this very list there, and are refused where another list or rank shows; holder[w, e] says to
// whom rank w sends expert e, and without it all send to one.
using RoundOutputs = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
RoundOutputs round_pairs_cpu(const ScoredPairs& in, const GroupOffers& offers, int64_t tile, std::string_view rule,
                             int64_t key);

}  // namespace moetrain
