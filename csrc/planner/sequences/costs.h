// What sequences take on ranks that share them: the formula of moetrain/cost/sequence_costs.py.
#pragma once
#include <algorithm>
#include <cstdint>

namespace moetrain::planner {

struct PassCosts {
    double square_ms, token_ms, item_ms, hop_ms, hop_token_ms;
};

struct SequenceCosts {
    PassCosts passes[2];

    // Sequences of so many tokens, and of so many squared ones, that one item has. Without what the item costs.
    double ms(double squares, double tokens, int64_t num_ranks) const {
        const double d = static_cast<double>(num_ranks), share = tokens / d;
        double sum = 0;
        for (const PassCosts& pass : passes) {
            const double ring = (d - 1) * (pass.hop_ms + pass.hop_token_ms * share);
            sum += std::max(pass.square_ms * squares / d, ring) + pass.token_ms * share;
        }
        return sum;
    }
    double ms(int64_t num_tokens, int64_t num_ranks) const {
        const double tokens = static_cast<double>(num_tokens);
        return ms(tokens * tokens, tokens, num_ranks);
    }
    double item_ms() const { return passes[0].item_ms + passes[1].item_ms; }
};

}  // namespace moetrain::planner
