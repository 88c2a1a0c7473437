// The K largest keys of a row, in order, by sorting networks whose lanes are experts.
//
// A key and its expert id are packed into one 64-bit integer in the total order (key descending, id ascending), so
// that nothing ties. A block of kDepth vectors is sorted lane by lane; sorted blocks, and then halves of the lanes,
// merge into the kDepth best of both. No branch depends on data. The vectors are GNU vectors, which the compiler
// fits to each instruction set that it compiles for.
#pragma once
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/common/rows.h"

namespace moetrain {

constexpr int kTopKLanes = 8;
constexpr int kMaxTopKDepth = 16;  // the most that a network chooses

// How many keys a row must have room for, so that whole blocks can be read; those beyond the row never win.
constexpr int64_t padded_for_top_k(int64_t num_keys) {
    constexpr int64_t block = kTopKLanes * kMaxTopKDepth;
    return (num_keys + block - 1) / block * block;
}

template <int kLanes>
struct PackedKeys {
    typedef int64_t Vector __attribute__((vector_size(8 * kLanes)));
};
template <int kLanes>
using Packed = typename PackedKeys<kLanes>::Vector;

struct Comparator {
    int8_t above, below;
};
struct Network {
    std::array<Comparator, 96> comparators{};
    int size = 0;
    constexpr void add(int above, int below) {
        comparators[size++] = {static_cast<int8_t>(above), static_cast<int8_t>(below)};
    }
};

// Batcher's odd-even merge sort.
constexpr Network sorting_network(int depth) {
    Network network;
    for (int p = 1; p < depth; p *= 2) {
        for (int k = p; k >= 1; k /= 2) {
            for (int j = k % p; j + k < depth; j += 2 * k) {
                for (int i = j; i < j + k && i + k < depth; ++i) {
                    if (i / (2 * p) == (i + k) / (2 * p)) network.add(i, i + k);
                }
            }
        }
    }
    return network;
}

// Sorts what rises and then falls, or falls and then rises.
constexpr Network bitonic_network(int depth) {
    Network network;
    for (int k = depth / 2; k >= 1; k /= 2) {
        for (int i = 0; i < depth; ++i) {
            if ((i & k) == 0) network.add(i, i + k);
        }
    }
    return network;
}

template <typename Vector>
MOETRAIN_INLINE void compare_exchange(Vector& above, Vector& below) {
    const Vector larger = above > below ? above : below;
    below = above > below ? below : above;
    above = larger;
}

// Written out comparator by comparator, so that the vectors stay in registers.
template <const Network& kNetwork, typename Vector, size_t... kIndex>
MOETRAIN_INLINE void run_network([[maybe_unused]] Vector* x, std::index_sequence<kIndex...>) {
    (compare_exchange(x[kNetwork.comparators[kIndex].above], x[kNetwork.comparators[kIndex].below]), ...);
}

template <int kDepth>
struct Networks {
    static constexpr Network kSort = sorting_network(kDepth);
    static constexpr Network kBitonic = bitonic_network(kDepth);
};

template <int kDepth, typename Vector>
MOETRAIN_INLINE void sort_lanes(Vector* x) {
    run_network<Networks<kDepth>::kSort>(x, std::make_index_sequence<Networks<kDepth>::kSort.size>{});
}

template <int kDepth, typename Vector>
MOETRAIN_INLINE void sort_bitonic_lanes(Vector* x) {
    run_network<Networks<kDepth>::kBitonic>(x, std::make_index_sequence<Networks<kDepth>::kBitonic.size>{});
}

// best[i] of 2 * kLanes lanes to merged[i] of kLanes lanes, each again sorted.
template <int kDepth, int kLanes, size_t... kLane>
MOETRAIN_INLINE void merge_halves(const Packed<2 * kLanes>* best, Packed<kLanes>* merged,
                                  std::index_sequence<kLane...>) {
#pragma GCC unroll 16
    for (int i = 0; i < kDepth; ++i) {
        const Packed<2 * kLanes>& mirrored = best[kDepth - 1 - i];
        const Packed<kLanes> low = __builtin_shufflevector(best[i], best[i], kLane...);
        const Packed<kLanes> high = __builtin_shufflevector(mirrored, mirrored, (kLanes + kLane)...);
        merged[i] = low > high ? low : high;
    }
    sort_bitonic_lanes<kDepth>(merged);
}

template <int kDepth>
MOETRAIN_INLINE void load_packed(const int32_t* key, int64_t first, Packed<kTopKLanes>* x) {
    typedef int32_t Keys __attribute__((vector_size(4 * kTopKLanes)));
    constexpr Packed<kTopKLanes> kLane = {0, 1, 2, 3, 4, 5, 6, 7};
#pragma GCC unroll 16
    for (int i = 0; i < kDepth; ++i) {
        const int64_t start = first + i * kTopKLanes;
        Keys keys;
        std::memcpy(&keys, key + start, sizeof keys);
        // The lower the id, the larger the low half.
        x[i] = (__builtin_convertvector(keys, Packed<kTopKLanes>) << 32) | (UINT32_MAX - start - kLane);
    }
}

template <int kDepth>
MOETRAIN_INLINE void top_k_by_network(const int32_t* key, int64_t num_keys, int64_t top_k, int32_t* place) {
    Packed<kTopKLanes> best[kDepth];
    load_packed<kDepth>(key, 0, best);
    sort_lanes<kDepth>(best);
    for (int64_t first = kTopKLanes * kDepth; first < num_keys; first += kTopKLanes * kDepth) {
        Packed<kTopKLanes> next[kDepth];
        load_packed<kDepth>(key, first, next);
        sort_lanes<kDepth>(next);
#pragma GCC unroll 16
        for (int i = 0; i < kDepth; ++i)
            best[i] = best[i] > next[kDepth - 1 - i] ? best[i] : next[kDepth - 1 - i];
        sort_bitonic_lanes<kDepth>(best);
    }
    Packed<4> best_of_4[kDepth];
    Packed<2> best_of_2[kDepth];
    merge_halves<kDepth, 4>(best, best_of_4, std::make_index_sequence<4>{});
    merge_halves<kDepth, 2>(best_of_4, best_of_2, std::make_index_sequence<2>{});
    // The last two lanes: both hold the merged order, of which one is read.
    Packed<2> merged[kDepth];
#pragma GCC unroll 16
    for (int i = 0; i < kDepth; ++i) {
        const Packed<2> other = __builtin_shufflevector(best_of_2[kDepth - 1 - i], best_of_2[kDepth - 1 - i], 1, 0);
        merged[i] = best_of_2[i] > other ? best_of_2[i] : other;
    }
    sort_bitonic_lanes<kDepth>(merged);
    int32_t found[kDepth];
#pragma GCC unroll 16
    for (int i = 0; i < kDepth; ++i)
        found[i] = static_cast<int32_t>(UINT32_MAX - static_cast<uint32_t>(merged[i][0]));
    for (int64_t k = 0; k < top_k; ++k)
        place[k] = found[k];
}

// The places of the top_k <= kMaxTopKDepth largest keys, the largest first, the lower place first among equals. Keys
// from num_keys up to padded_for_top_k(num_keys) are INT32_MIN.
MOETRAIN_INLINE void top_k_row(const int32_t* key, int64_t num_keys, int64_t top_k, int32_t* place) {
    if (top_k == 1) return top_k_by_network<1>(key, num_keys, top_k, place);
    if (top_k == 2) return top_k_by_network<2>(key, num_keys, top_k, place);
    if (top_k <= 4) return top_k_by_network<4>(key, num_keys, top_k, place);
    if (top_k <= 8) return top_k_by_network<8>(key, num_keys, top_k, place);
    return top_k_by_network<16>(key, num_keys, top_k, place);
}

}  // namespace moetrain
