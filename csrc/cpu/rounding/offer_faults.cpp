// Whether offers may be trusted: writing the rounded list relies on this rank's offers being of the list it writes.
#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/rounding/round_pairs.h"

namespace moetrain {
namespace {

constexpr int64_t kExpertsPerCheck = 8;
constexpr int64_t kMostRows = std::numeric_limits<int32_t>::max();

enum Mark : uint8_t { kUnlisted, kListed, kOffered };  // of a token, to one expert

// What holds for any rank's offers, whatever its list.
OfferFault fault_of_counts(const OfferRow& row) {
    const auto outside = [](int64_t x, int64_t most) { return x < 0 || x > most; };
    if (outside(row.chosen(), kMostRows)) return {"the chosen pairs must be between 0 and ", kMostRows, row.chosen()};
    if (outside(row.candidates(), kMostRows))
        return {"the candidates must be between 0 and ", kMostRows, row.candidates()};
    const int64_t drop = row.length(OfferRow::kDrop), fill = row.length(OfferRow::kFill);
    const int64_t most_drop = std::min(row.tile, row.chosen()), most_fill = std::min(row.tile, row.candidates());
    if (outside(drop, most_drop))
        return {"the tokens to drop must number between 0 and min(tile, chosen) = ", most_drop, drop};
    if (outside(fill, most_fill))
        return {"the tokens to fill must number between 0 and min(tile, candidates) = ", most_fill, fill};
    return {};
}

// What this rank's offers must have in common with its list. `marks` says of each token what is known of it.
template <typename Acc>
OfferFault fault_of_tokens(const RoundInput& in, const Acc* score_TE, int64_t stride, int64_t e, const OfferRow& row,
                           uint8_t* marks) {
    for (const int64_t side : {OfferRow::kDrop, OfferRow::kFill}) {
        const int32_t* token = in.offer_token_E2M + (2 * e + side) * in.tile;
        const uint8_t expected = side == OfferRow::kDrop ? kListed : kUnlisted;
        for (int64_t i = 0; i < row.length(side); ++i) {
            const int64_t t = token[i];
            if (t < 0 || t >= in.pairs.num_tokens)
                return {"each offered token must be between 0 and ", in.pairs.num_tokens - 1, t};
            if (marks[t] != expected)
                return {side == OfferRow::kDrop ? "tokens to drop must be distinct and of the list"
                                                : "tokens to fill must be distinct and not of the list",
                        -1, t};
            marks[t] = kOffered;
            if (row.entry(side, i)[0] != offer_key(score_TE[t * stride + e]))
                return {"each token must have the score that it was offered with", -1, t};
        }
    }
    return {};
}

template <typename Acc>
OfferFault fault_of_list(const RoundInput& in, const Acc* score_TE, int64_t stride, int64_t e, const OfferRow& row,
                         std::vector<uint8_t>& marks) {
    const int32_t *begin = in.pairs.token + in.pairs.offset[e], *end = in.pairs.token + in.pairs.offset[e + 1];
    const int64_t listed = end - begin, others = in.pairs.num_tokens - listed;
    if (row.chosen() != listed) return {"the chosen pairs must be the list's ", listed, row.chosen()};
    if (row.candidates() > others) return {"the candidates must be at most T - chosen = ", others, row.candidates()};
    for (const int32_t* token = begin; token != end; ++token)
        marks[*token] = kListed;
    const OfferFault fault = fault_of_tokens(in, score_TE, stride, e, row, marks.data());
    if (fault.must != nullptr) return fault;  // and the marks are of no more use
    for (const int32_t* token = begin; token != end; ++token)
        marks[*token] = kUnlisted;
    const int32_t* fill = in.offer_token_E2M + (2 * e + OfferRow::kFill) * in.tile;
    for (int64_t i = 0; i < row.length(OfferRow::kFill); ++i)
        marks[fill[i]] = kUnlisted;
    return fault;
}

}  // namespace

template <typename Acc>
OfferFault first_offer_fault(const RoundInput& in, const Acc* score_TE, int64_t stride) {
    const int64_t num_experts = in.pairs.num_experts;
    const auto row_of = [&](int64_t rank, int64_t e) {
        return OfferRow{in.offers_WEX + (rank * num_experts + e) * OfferRow::size(in.tile), in.tile};
    };
    for (int64_t rank = 0; rank < in.world; ++rank) {
        for (int64_t e = 0; e < num_experts; ++e) {
            OfferFault fault = fault_of_counts(row_of(rank, e));
            if (fault.must == nullptr) continue;
            fault.rank = rank;
            fault.expert = e;
            return fault;
        }
    }
    std::vector<OfferFault> fault_E(num_experts);
    at::parallel_for(0, num_experts, kExpertsPerCheck, [&](int64_t begin, int64_t end) {
        std::vector<uint8_t> marks(in.pairs.num_tokens, kUnlisted);
        for (int64_t e = begin; e < end; ++e) {
            fault_E[e] = fault_of_list(in, score_TE, stride, e, row_of(in.rank, e), marks);
            fault_E[e].rank = in.rank;
            fault_E[e].expert = e;
            if (fault_E[e].must != nullptr) return;
        }
    });
    const auto first = std::find_if(fault_E.begin(), fault_E.end(), [](const auto& f) { return f.must != nullptr; });
    return first == fault_E.end() ? OfferFault{} : *first;
}

template OfferFault first_offer_fault(const RoundInput&, const float*, int64_t);
template OfferFault first_offer_fault(const RoundInput&, const double*, int64_t);

}  // namespace moetrain
