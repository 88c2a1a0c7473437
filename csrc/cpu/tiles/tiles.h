// Tile products: c[i][0 .. 64) = sum over k of a[i][k] * panel[k][0 .. 64). Included once per instruction set; see
// kernels.h.

template <typename T>
inline T load_unaligned(const T* from) {
    T value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}

// Units whose products are summed one after another; longer sums are sums of such sums.
constexpr int64_t kUnitsPerChunk = 128;

// What a tile product without a transposer of its own inherits.
struct Untransposing {
    static constexpr bool kTransposes = false;
};

// Floats or doubles with the compiler's vectors of kVectorBytes, kRows rows by kVectors vectors at a time in registers.
template <typename T, int kVectorBytes, int kTileRows, int kVectors, int kTileColumns = kPanel>
struct VectorTile : Untransposing {
    struct Session {};
    static constexpr int64_t kRows = kTileRows, kColumns = kTileColumns;
    static constexpr int64_t kUnitMultiple = 1;
    static constexpr bool kEvenRows = false;
    typedef T Vector __attribute__((vector_size(kVectorBytes)));
    struct Unaligned {
        Vector v;
    };
    static constexpr int64_t kWidth = kVectorBytes / static_cast<int64_t>(sizeof(T));

    template <int kCount>
    static void multiply_rows(const T* const* a, int64_t k_units, const T* panel, T* c) {
        for (int64_t begin = 0; begin == 0 || begin < k_units; begin += kUnitsPerChunk)
            multiply_chunk<kCount>(a, begin, least(begin + kUnitsPerChunk, k_units), panel, c);
    }

    template <int kCount>
    static void multiply_chunk(const T* const* a, int64_t begin, int64_t end, const T* panel, T* c) {
        for (int64_t j = 0; j < kColumns; j += kVectors * kWidth) {
            Vector sum[kCount][kVectors] = {};
            for (int64_t k = begin; k < end; ++k) {
                Vector b[kVectors];
#pragma GCC unroll 8
                for (int v = 0; v < kVectors; ++v)
                    __builtin_memcpy(&b[v], panel + k * kColumns + j + v * kWidth, sizeof(Vector));
#pragma GCC unroll 8
                for (int i = 0; i < kCount; ++i) {
                    const T x = a[i][k];
#pragma GCC unroll 8
                    for (int v = 0; v < kVectors; ++v)
                        sum[i][v] += x * b[v];
                }
            }
#pragma GCC unroll 8
            for (int i = 0; i < kCount; ++i) {
#pragma GCC unroll 8
                for (int v = 0; v < kVectors; ++v) {
                    T* const to = c + i * kColumns + j + v * kWidth;
                    if (begin > 0) sum[i][v] += load_unaligned(reinterpret_cast<const Unaligned*>(to)).v;
                    __builtin_memcpy(to, &sum[i][v], sizeof(Vector));
                }
            }
        }
    }

    static void multiply(const T* const* a, int64_t num_rows, int64_t /*rows_left*/, int64_t k_units, const T* panel,
                         T* c) {
        if (num_rows == kTileRows) return multiply_rows<kTileRows>(a, k_units, panel, c);
        for (int64_t i = 0; i < num_rows; ++i)
            multiply_rows<1>(a + i, k_units, panel, c + i * kColumns);
    }
};
