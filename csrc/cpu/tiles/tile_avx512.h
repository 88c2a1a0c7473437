// Tile products with 512-bit registers: 6 rows by 64 columns (or 12 by 32), that is 24 sums, some columns of b
// and 1 broadcast. Included
// once per instruction set; see kernels.h.

// Transposes 16 x 16 words of 32 bits.
inline void transpose_16(__m512i* r) {
    __m512i t[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // r[4 b + c] now holds column 4 lane + c of rows 4 b .. 4 b + 3 in each 128-bit lane.
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const __m512i low01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);   // lanes 0 and 2 of blocks 0 and 1
        const __m512i high01 = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);  // lanes 1 and 3
        const __m512i low23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        const __m512i high23 = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
        t[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
        t[8 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
        t[4 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
        t[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i)
        r[i] = t[i];
}

struct Transposing {
    static constexpr bool kTransposes = true;

    // to[i][j] = word i of the row that starts at rows[j][element], for i, j < 16.
    template <typename Store, typename Unit>
    static void transpose_rows(const Store* const* rows, int64_t element, Unit* to, int64_t stride) {
        __m512i r[16];
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j)
            r[j] = _mm512_loadu_si512(rows[j] + element);
        transpose_16(r);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
            _mm512_storeu_si512(to + i * stride, r[i]);
    }

    template <typename Unit>
    static void transpose_block(const Unit* from, int64_t from_stride, Unit* to, int64_t to_stride) {
        __m512i r[16];
#pragma GCC unroll 16
        for (int j = 0; j < 16; ++j)
            r[j] = _mm512_loadu_si512(from + j * from_stride);
        transpose_16(r);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
            _mm512_storeu_si512(to + i * to_stride, r[i]);
    }
};

struct NotRounding {};

template <typename Unit, typename Multiplier, typename Rounding = NotRounding, int kVectors = 4>
struct Avx512Tile : Transposing, Rounding {
    struct Session {};
    static constexpr int64_t kRows = 24 / kVectors, kColumns = 16 * kVectors;
    static constexpr int64_t kUnitMultiple = 1;
    static constexpr bool kEvenRows = false;

    // Fetches a line of each row of the next tile while it multiplies a line of these. Sums of many units are taken in
    // chunks: their rounding errors grow with a chunk, not with the whole sum.
    template <int kCount>
    static void multiply_rows(const Unit* const* a, const Unit* const* next, int64_t k_units, const Unit* panel,
                              float* c) {
        const auto row = [c](int i) { return c + i * kColumns; };
        for (int64_t begin = 0; begin == 0 || begin < k_units; begin += Multiplier::kChunk) {
            const int64_t end = least(begin + Multiplier::kChunk, k_units);
            multiply_chunk<kCount>(a, next, begin, end, panel, row, begin > 0);
        }
    }

    // Row i's sums go to c(i), or are added to what is there.
    template <int kCount, typename Row>
    static void multiply_chunk(const Unit* const* a, const Unit* const* next, int64_t begin, int64_t end,
                               const Unit* panel, const Row& c, bool add) {
        constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(Unit));
        __m512 sum[kCount][kVectors];
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v)
                sum[i][v] = _mm512_setzero_ps();
        }
        for (int64_t line = begin; line < end; line += kLine) {
            const int64_t stop = least(line + kLine, end);
#pragma GCC unroll 16
            for (int i = 0; i < kCount; ++i)
                _mm_prefetch(reinterpret_cast<const char*>(next[i] + line), _MM_HINT_T0);
            for (int64_t k = line; k < stop; ++k) {
                typename Multiplier::Vector b[kVectors];
#pragma GCC unroll 4
                for (int v = 0; v < kVectors; ++v)
                    b[v] = Multiplier::load(panel + k * kColumns + 16 * v);
#pragma GCC unroll 16
                for (int i = 0; i < kCount; ++i) {
                    const auto x = Multiplier::broadcast(a[i] + k);
#pragma GCC unroll 4
                    for (int v = 0; v < kVectors; ++v)
                        sum[i][v] = Multiplier::add_product(sum[i][v], x, b[v]);
                }
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                float* const to = c(i) + 16 * v;
                _mm512_storeu_ps(to, add ? _mm512_add_ps(_mm512_loadu_ps(to), sum[i][v]) : sum[i][v]);
            }
        }
    }

    static void multiply(const Unit* const* a, int64_t num_rows, int64_t rows_left, int64_t k_units, const Unit* panel,
                         float* c) {
        const Unit* const* const next = rows_left >= 2 * kRows ? a + kRows : a;
        call_with<1>(num_rows, [&]<int kCount>() { multiply_rows<kCount>(a, next, k_units, panel, c); });
    }

    // Adds to rows of sums that lie anywhere, no two of them in one place; as if the product had been stored and added.
    static constexpr int64_t kUnitsAdded = Multiplier::kChunk;  // at most: longer sums are rounded in another order
    static void add_product(const Unit* const* a, int64_t num_rows, int64_t rows_left, int64_t k_units,
                            const Unit* panel, float* const* c) {
        const Unit* const* const next = rows_left >= 2 * kRows ? a + kRows : a;
        const auto row = [c](int i) { return c[i]; };
        call_with<1>(num_rows, [&]<int kCount>() { multiply_chunk<kCount>(a, next, 0, k_units, panel, row, true); });
    }

    // The number of rows as a constant.
    template <int kCount, typename Call>
    static void call_with(int64_t num_rows, const Call& call) {
        if constexpr (kCount < kRows) {
            if (num_rows > kCount) return call_with<kCount + 1>(num_rows, call);
        }
        call.template operator()<kCount>();
    }
};

struct FloatMultiplier {
    static constexpr int64_t kChunk = kUnitsPerChunk;
    using Vector = __m512;
    static Vector load(const float* from) { return _mm512_loadu_ps(from); }
    static Vector broadcast(const float* from) { return _mm512_set1_ps(*from); }
    static __m512 add_product(__m512 sum, Vector x, Vector b) { return _mm512_fmadd_ps(x, b, sum); }
};
