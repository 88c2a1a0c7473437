// Rows of 64 scores in four registers, from scores to stored weights. Included once per instruction set; see kernels.h.

// 2^x, by a polynomial over [-1/2, 1/2] with the least relative error: 2.6e-6 for what becomes bf16, else 1.9e-9. Below
// -125 it is 2^-125; NaN goes through.
template <bool kRough>
[[gnu::always_inline]] inline __m512 power_of_two(__m512 x) {
    const __m512 kRoundToWhole = _mm512_set1_ps(12582912.F);  // 1.5 * 2^23: adding it leaves whole numbers
    const __m512 clamped = _mm512_max_ps(_mm512_set1_ps(-125.F), x);
    const __m512 whole = _mm512_add_ps(clamped, kRoundToWhole);
    const __m512 r = _mm512_sub_ps(clamped, _mm512_sub_ps(whole, kRoundToWhole));
    const auto step = [&](__m512 p, float next) { return _mm512_fmadd_ps(p, r, _mm512_set1_ps(next)); };
    __m512 p;
    if constexpr (kRough) {
        p = step(_mm512_set1_ps(0.009570102F), 0.05591786F);
        p = step(p, 0.24024744F);
        p = step(p, 0.6931218F);
        p = step(p, 0.9999993F);
    } else {
        p = step(_mm512_set1_ps(1.5345812e-4F), 1.339993e-3F);
        p = step(p, 9.618489e-3F);
        p = step(p, 0.055503286F);
        p = step(p, 0.24022646F);
        p = step(p, 0.6931472F);
        p = step(p, 1.F);
    }
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(whole), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), exponent));
}

template <typename P>
struct Avx512Rows : AttentionRows<P> {
    using Base = AttentionRows<P>;
    using typename Base::Queries;
    using typename Base::Seen;
    using typename Base::Slopes;
    using typename Base::Softmax;
    using typename Base::Unit;
    using typename Base::Weight;
    static constexpr int64_t kKeys = Base::kKeys;
    static constexpr bool kPairs = P::kPack == 2;
    static constexpr float kLog2E = 1.44269504F;

    struct Row {
        __m512 v[4];

        static Row load(const float* from) {
            Row row;
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i)
                row.v[i] = _mm512_loadu_ps(from + 16 * i);
            return row;
        }
        static __mmask16 mask(const Seen& seen, int i) {
            const uint64_t before = seen.begin >= kKeys ? ~uint64_t{0} : (uint64_t{1} << seen.begin) - 1;
            const uint64_t until = seen.end <= 0 ? 0 : seen.end >= kKeys ? ~uint64_t{0} : (uint64_t{1} << seen.end) - 1;
            return static_cast<__mmask16>((until & ~before) >> (16 * i));
        }
        void hide(const Seen& seen, __m512 instead) {
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i)
                v[i] = _mm512_mask_mov_ps(instead, mask(seen, i), v[i]);
        }
        // v = exp(scale * v - shift)
        void exponentiate(float scale, float shift) {
            const __m512 factor = _mm512_set1_ps(scale * kLog2E), less = _mm512_set1_ps(shift * kLog2E);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i)
                v[i] = power_of_two<kPairs>(_mm512_fmsub_ps(v[i], factor, less));
        }
        // Numbers 32 half .. 32 half + 32 as pairs of bf16.
        __m512i rounded(int half) const {
            return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(v[2 * half + 1], v[2 * half]));
        }
        void store(Weight* to) const {
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                if constexpr (!kPairs) {
                    _mm512_storeu_ps(to + 16 * i, v[i]);
                } else if (i % 2 == 0) {
                    _mm512_storeu_si512(to + 16 * i, rounded(i / 2));
                }
            }
        }
    };

    static float weigh(const float* score, float scale, const Seen& seen, Softmax& state, Weight* weights) {
        Row row = Row::load(score);
        if (!seen.all()) {
            if (seen.none()) {
                Row{}.store(weights);
                return 1;
            }
            row.hide(seen, _mm512_set1_ps(-__builtin_inff()));
        }
        const float largest =
            _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(row.v[0], row.v[1]), _mm512_max_ps(row.v[2], row.v[3])));
        const float shrink = Base::keep_larger(scale * largest, state);
        row.exponentiate(scale, state.largest);
        if (!seen.all()) row.hide(seen, _mm512_setzero_ps());
        state.sum.v += reinterpret_cast<decltype(state.sum.v)>(
            _mm512_add_ps(_mm512_add_ps(row.v[0], row.v[1]), _mm512_add_ps(row.v[2], row.v[3])));
        row.store(weights);
        return shrink;
    }

    static void slopes(const float* score, const float* product, float scale, const Queries& queries,
                       const Slopes& to) {
        Row weight[P::kPack], slope[P::kPack];
#pragma GCC unroll 2
        for (int r = 0; r < P::kPack; ++r) {
            weight[r] = Row::load(score + r * kKeys);
            weight[r].exponentiate(scale, queries.lse[r]);
            const __m512 less = _mm512_set1_ps(queries.delta[r]);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i)
                slope[r].v[i] =
                    _mm512_mul_ps(weight[r].v[i], _mm512_sub_ps(_mm512_loadu_ps(product + r * kKeys + 16 * i), less));
            if (!queries.seen[r].all()) {
                weight[r].hide(queries.seen[r], _mm512_setzero_ps());
                slope[r].hide(queries.seen[r], _mm512_setzero_ps());
            }
            slope[r].store(to.rows + r * kKeys);
        }
        if constexpr (kPairs) {
            store_pairs(weight, to.weight_panel);
            store_pairs(slope, to.panel);
        } else {
            weight[0].store(to.weight_panel);
            slope[0].store(to.panel);
        }
    }

    // Unit j = number j of both rows.
    static void store_pairs(const Row* rows, Unit* to) {
        const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(rows[1].v[i], rows[0].v[i]));
            _mm512_storeu_si512(to + 16 * i, _mm512_permutexvar_epi16(order, both));
        }
    }
};
