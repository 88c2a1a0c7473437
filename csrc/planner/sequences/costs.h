// What a sequence of s tokens takes on d ranks that share it: the formula of moetrain/cost/sequence_costs.py.
#pragma once
#include <algorithm>
#include <cstdint>

namespace moetrain::planner {

struct PassCosts {
    double square_ms, token_ms, item_ms, hop_ms, hop_token_ms;
};

struct SequenceCosts {
    PassCosts passes[2];

    // Without what an item costs, which sequences of one item share.
    double ms(int64_t num_tokens, int64_t num_ranks) const {
        const double s = static_cast<double>(num_tokens), d = static_cast<double>(num_ranks), share = s / d;
        double sum = 0;
        for (const PassCosts& pass : passes) {
            const double ring = (d - 1) * (pass.hop_ms + pass.hop_token_ms * share);
            sum += std::max(pass.square_ms * s * share, ring) + pass.token_ms * share;
        }
        return sum;
    }
    double item_ms() const { return passes[0].item_ms + passes[1].item_ms; }
};

}  // namespace moetrain::planner
