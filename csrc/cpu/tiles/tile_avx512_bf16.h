// Products of pairs of bf16 for tile_avx512.h. Included once, for machines with AVX512_BF16; see kernels.h.

struct Bf16Multiplier {
    static constexpr int64_t kChunk = int64_t{1} << 40;  // what is stored is rounded more than any sum
    using Vector = __m512i;
    static Vector load(const uint32_t* from) { return _mm512_loadu_si512(from); }
    static Vector broadcast(const uint32_t* from) {
        return _mm512_set1_epi32(static_cast<int32_t>(load_unaligned(from)));
    }
    static __m512 add_product(__m512 sum, Vector x, Vector b) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(b));
    }
};

// Rounds to nearest even, as store_number does; a subnormal becomes zero.
struct RoundingToBf16 {
    template <int64_t kCount>
    static void round(const float* from, Bf16* to) {
#pragma GCC unroll 2
        for (int64_t j = 0; j < kCount; j += 32) {
            const __m512 low = _mm512_loadu_ps(from + j), high = _mm512_loadu_ps(from + j + 16);
            _mm512_storeu_si512(to + j, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
        }
    }
};
