#pragma once
#include <cstdint>

#include "common/round_pairs_math.h"

namespace moetrain {

// The first expert whose pairs break the order, or leave [0, num_tokens) or the capacity; -1 when none does.
int64_t first_unordered_expert(const PairList& pairs);

// Fills offers_EX and token_E2M, which are zero beforehand. Acc is float or double.
template <typename Acc>
void offer_pairs_kernel(const OfferInput<Acc>& in, int64_t* offers_EX, int32_t* token_E2M);

// What an offer breaks: `must` and, unless negative, `limit` say what has to hold, and `got` came instead. Without a
// fault `must` is null.
struct OfferFault {
    const char* must = nullptr;
    int64_t limit = -1;
    int64_t got = 0;
    int64_t rank = 0;
    int64_t expert = 0;
};

// The first offer that no list could have made or, of this rank, that its own pairs and scores have not made.
// Linear in the pairs, tokens and offers. Acc is float or double.
template <typename Acc>
OfferFault first_offer_fault(const RoundInput& in, const Acc* score_TE, int64_t stride);

// Offers must be without fault.
void round_pairs_kernel(const RoundInput& in, const RoundOutput& out);

}  // namespace moetrain
