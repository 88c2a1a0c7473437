// Rows of 64 scores on their way to the weights that products read. Included once per instruction set; see kernels.h.
// rows_avx512.h does the same in registers.

template <typename P>
struct AttentionRows {
    using Acc = typename P::Acc;
    using Unit = typename P::Unit;
    // Weights as a product reads them: pairs of bf16, or single floats.
    using Weights = typename If<P::kPack == 2, P, Singles<Acc>>::Type;
    using Weight = typename Weights::Store;
    static constexpr int64_t kKeys = attention::kKeys;

    // Columns of a block of keys that a query sees: [begin, end).
    struct Seen {
        int32_t begin = 0, end = 0;
        bool none() const { return begin >= end; }
        bool all() const { return begin == 0 && end == kKeys; }
        bool sees(int32_t j) const { return j >= begin && j < end; }
    };
    // kPack queries in the backward pass.
    struct Queries {
        const Acc *lse, *delta;
        Seen seen[P::kPack];
    };
    // Where a block's slopes go by rows, and weights and slopes as panels whose units are numbers (or pairs of them) of
    // one key.
    struct Slopes {
        Weight* rows;
        Unit *weight_panel, *panel;
    };
    struct Softmax {
        Acc largest = Acc(-__builtin_inf());  // or nearly
        Lanes<Acc> sum = {};
    };

    // One query's scores become weights. Returns what the query's earlier sums must be multiplied by.
    static Acc weigh(Acc* score, Acc scale, const Seen& seen, Softmax& state, Weight* weights) {
        if (seen.none()) {
            for (int64_t j = 0; j < kKeys; ++j)
                weights[j] = Weight{};
            return 1;
        }
        if (!seen.all()) {
            for (int32_t j = 0; j < kKeys; ++j)
                score[j] = seen.sees(j) ? score[j] : Acc(-__builtin_inf());
        }
        const Acc shrink = keep_larger(scale * largest(score), state);
        exponentiate(scale, state.largest, seen, score);
        for (int64_t j = 0; j < kKeys; j += kLanes)
            state.sum.add(Lanes<Acc>::load(score + j));
        for (int64_t j = 0; j < kKeys; ++j)
            store_number(score[j], weights + j);
        return shrink;
    }

    // What is subtracted from scores need not be the largest of them, only near it: sums are rescaled seldom then.
    static Acc keep_larger(Acc block_largest, Softmax& state) {
        constexpr Acc kNear = 8;
        if (!(block_largest > state.largest + kNear)) return 1;
        const Acc shrink = exp_clamped(state.largest - block_largest);
        state.largest = block_largest;
        state.sum.v *= shrink;
        return shrink;
    }

    // kPack queries' scores and products dy v^T become weights exp(scale * score - lse) and slopes weight * (product -
    // delta).
    static void slopes(Acc* score, Acc* product, Acc scale, const Queries& queries, const Slopes& to) {
        Weight weights[P::kPack][kKeys];
        for (int64_t r = 0; r < P::kPack; ++r) {
            Acc* const weight = score + r * kKeys;
            Acc* const slope = product + r * kKeys;
            const Seen& seen = queries.seen[r];
            exponentiate(scale, queries.lse[r], seen, weight);
            for (int64_t j = 0; j < kKeys; ++j)
                slope[j] = weight[j] * (slope[j] - queries.delta[r]);
            if (!seen.all()) {
                for (int32_t j = 0; j < kKeys; ++j)
                    slope[j] = seen.sees(j) ? slope[j] : Acc(0);
            }
            for (int64_t j = 0; j < kKeys; ++j) {
                store_number(weight[j], weights[r] + j);
                store_number(slope[j], to.rows + r * kKeys + j);
            }
        }
        for (int64_t j = 0; j < kKeys; ++j) {
            if constexpr (P::kPack == 2) {
                to.weight_panel[j] = make_unit(weights[0][j], weights[1][j], P{});
                to.panel[j] = make_unit(to.rows[j], to.rows[kKeys + j], P{});
            } else {
                to.weight_panel[j] = weights[0][j];
                to.panel[j] = to.rows[j];
            }
        }
    }

    static Acc largest(const Acc* score) {
        auto lanes = Lanes<Acc>::load(score);
        for (int64_t j = kLanes; j < kKeys; j += kLanes)
            lanes.keep_larger(Lanes<Acc>::load(score + j));
        return lanes.largest();
    }

    // score = exp(scale * score - shift) where seen, else 0.
    static void exponentiate(Acc scale, Acc shift, const Seen& seen, Acc* score) {
        for (int64_t j = 0; j < kKeys; ++j)
            score[j] = exp_clamped(scale * score[j] - shift);
        if (seen.all()) return;
        for (int32_t j = 0; j < kKeys; ++j)
            score[j] = seen.sees(j) ? score[j] : Acc(0);
    }
};
