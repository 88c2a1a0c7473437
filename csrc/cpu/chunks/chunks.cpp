#include "cpu/chunks/chunks.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/common/rows.h"

namespace moetrain {
namespace {

// bf16 bits of x, to the nearest, ties to even, NaN to the quiet one: as c10's constructor, but without a branch, so
// that the compiler turns whole rows into vectors.
MOETRAIN_INLINE uint16_t bf16_bits_of(float x) {
    const auto bits = std::bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
    return static_cast<uint16_t>(x != x ? 0x7fc0U : rounded);
}

// to[i] = from[i] for i < size. The two do not overlap.
template <typename From, typename To>
MOETRAIN_CLONES void copy_chunk(const From* from, int64_t size, To* to) {
    if constexpr (std::is_same_v<From, To>) {
        if (size > 0) std::memcpy(to, from, static_cast<size_t>(size) * sizeof(To));  // null where tensors are empty
    } else if constexpr (std::is_same_v<From, float> && std::is_same_v<To, c10::BFloat16>) {
        auto* bits = reinterpret_cast<uint16_t*>(to);
        for (int64_t i = 0; i < size; ++i)
            bits[i] = bf16_bits_of(from[i]);
    } else {
        convert_row(from, size, to);
    }
}

template <typename T>
MOETRAIN_INLINE const T* source_at(const void* const* data, const int64_t* row) {
    return static_cast<const T*>(data[row[0]]) + row[1];
}

// to[i] = the sum of from[row[0]][row[1] + i] over `num_rows` rows of a table of four columns, first to last, in Acc,
// rounded once. Pieces of kPiece elements keep the sums in cache, so that memory is read and written once.
template <typename From, typename To, typename Acc>
MOETRAIN_CLONES void sum_chunks(const void* const* data, const int64_t* rows, int64_t num_rows, int64_t start,
                                int64_t size, To* to) {
    constexpr int64_t kPiece = 1024;
    Acc sum[kPiece];
    for (int64_t done = 0; done < size; done += kPiece) {
        const int64_t length = std::min(kPiece, size - done);
        convert_row(source_at<From>(data, rows) + start + done, length, sum);
        for (int64_t n = 1; n < num_rows; ++n) {
            const From* from = source_at<From>(data, rows + 4 * n) + start + done;
            for (int64_t i = 0; i < length; ++i)
                sum[i] += static_cast<Acc>(from[i]);
        }
        copy_chunk(sum, length, to + done);
    }
}

template <typename From, typename To>
void copy_untyped(const void* from, int64_t size, void* to) {
    copy_chunk(static_cast<const From*>(from), size, static_cast<To*>(to));
}

template <typename From, typename To>
void sum_untyped(const void* const* data, const int64_t* rows, int64_t num_rows, int64_t start, int64_t size,
                 void* to) {
    constexpr bool kWide = std::is_same_v<From, double> || std::is_same_v<To, double>;
    using Acc = std::conditional_t<kWide, double, float>;
    sum_chunks<From, To, Acc>(data, rows, num_rows, start, size, static_cast<To*>(to));
}

template <typename From, typename To>
constexpr ChunkKernels kernels_of() {
    return {sizeof(From), sizeof(To), &copy_untyped<From, To>, &sum_untyped<From, To>};
}

template <typename From>
ChunkKernels kernels_from(at::ScalarType to) {
    switch (to) {
        case at::kBFloat16:
            return kernels_of<From, c10::BFloat16>();
        case at::kHalf:
            return kernels_of<From, c10::Half>();
        case at::kDouble:
            return kernels_of<From, double>();
        default:
            return kernels_of<From, float>();
    }
}

}  // namespace

ChunkKernels chunk_kernels(at::ScalarType from, at::ScalarType to) {
    switch (from) {
        case at::kBFloat16:
            return kernels_from<c10::BFloat16>(to);
        case at::kHalf:
            return kernels_from<c10::Half>(to);
        case at::kDouble:
            return kernels_from<double>(to);
        default:
            return kernels_from<float>(to);
    }
}

}  // namespace moetrain
