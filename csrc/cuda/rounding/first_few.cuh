// The first few of many scored tokens, in an order without ties, kept in shared memory by a block. For .cu files only.
//
// A list has room for at least twice as many as are wanted. Threads append whatever ranks above a floor that only
// rises; where a list is full, a warp finds a higher floor that keeps enough, and drops what is below. So each token is
// looked at once, nearly all of them are dropped by one comparison, and nothing is sorted but what is left at the end.
#pragma once
#include <type_traits>

#include "common/round_pairs_math.h"
#include "cuda/common/warp.cuh"

namespace moetrain {

// Tokens by (word descending, then global id): the order in which tokens win, or with `reversed` ids that in which they
// lose. No score has the word 0, which fills up what a sort needs.
template <typename Acc>
struct TokenRanking {
    using Word = std::make_unsigned_t<typename OrderedKey<Acc>::Int>;
    static constexpr Word kTopBit = Word(1) << (sizeof(Word) * 8 - 1);

    const int64_t* token_gid_T2;
    bool reversed;

    __device__ __forceinline__ Word word_of(Acc score) const {
        const Word ascending = static_cast<Word>(offer_key(score)) ^ kTopBit;
        return reversed ? ~ascending : ascending;
    }
    __device__ __forceinline__ int64_t key_of(Word word) const {
        return static_cast<typename OrderedKey<Acc>::Int>((reversed ? ~word : word) ^ kTopBit);
    }
    __device__ __forceinline__ bool precedes(Word a, int32_t a_token, Word b, int32_t b_token) const {
        if (a != b || a == 0) return a > b;
        return reversed ? comes_before(token_gid_T2, b_token, a_token) : comes_before(token_gid_T2, a_token, b_token);
    }
};

// One list. Between barriers, threads either append or one warp shrinks it.
template <typename Acc>
struct FirstFew {
    using Word = typename TokenRanking<Acc>::Word;
    struct Floor {
        Word word;
        int32_t token;  // -1: all that have the word may enter
        int32_t count;  // of the list; more than its room where not all found a place
    };

    Word* word;      // [room]
    int32_t* token;  // [room]
    Floor* floor;
    int32_t room;  // a power of two
    int32_t wanted;

    __device__ __forceinline__ void reset() const { *floor = {0, -1, 0}; }
    __device__ __forceinline__ int32_t size() const { return min(floor->count, room); }
    __device__ __forceinline__ bool is_crowded() const { return floor->count > room / 4 * 3; }

    __device__ __forceinline__ bool may_enter(const TokenRanking<Acc>& ranking, Word its_word,
                                              int32_t its_token) const {
        if (its_word != floor->word) return its_word > floor->word;
        return floor->token < 0 || ranking.precedes(its_word, its_token, floor->word, floor->token);
    }
    // Says whether there was a place.
    __device__ __forceinline__ bool append(Word its_word, int32_t its_token) const {
        const int32_t place = atomicAdd(&floor->count, 1);
        if (place >= room) return false;
        word[place] = its_word;
        token[place] = its_token;
        return true;
    }
};

// Who sorts together: a warp or a block.
struct WarpTeam {
    int size, idx;
    __device__ __forceinline__ WarpTeam() : size(kWarpSize), idx(threadIdx.x % kWarpSize) {}
    __device__ __forceinline__ void sync() const { __syncwarp(); }
};
struct BlockTeam {
    int size, idx;
    __device__ __forceinline__ BlockTeam() : size(blockDim.x), idx(threadIdx.x) {}
    __device__ __forceinline__ void sync() const { __syncthreads(); }
};

// Exchanges what a bitonic sort of `size` elements, a power of two, has to; `is_before(i, j)` compares two of them.
template <typename Team, typename IsBefore, typename Swap>
__device__ __forceinline__ void bitonic_sort(const Team& team, int size, const IsBefore& is_before, const Swap& swap) {
    for (int run = 2; run <= size; run *= 2) {
        for (int distance = run / 2; distance > 0; distance /= 2) {
            for (int i = team.idx; i < size / 2; i += team.size) {
                const int low = 2 * i - (i & (distance - 1));
                const int high = low + distance;
                const bool ascends = (low & run) == 0;
                if (is_before(high, low) == ascends) swap(low, high);
            }
            team.sync();
        }
    }
}

template <typename Acc, typename Team>
__device__ __forceinline__ void sort_few(const FirstFew<Acc>& few, const TokenRanking<Acc>& ranking, const Team& team) {
    for (int i = few.size() + team.idx; i < few.room; i += team.size)
        few.word[i] = 0;
    team.sync();
    bitonic_sort(
        team, few.room,
        [&](int i, int j) { return ranking.precedes(few.word[i], few.token[i], few.word[j], few.token[j]); },
        [&](int i, int j) {
            const auto word = few.word[i];
            const int32_t token = few.token[i];
            few.word[i] = few.word[j];
            few.token[i] = few.token[j];
            few.word[j] = word;
            few.token[j] = token;
        });
}

// Keeps what has at least the word `floor`, in any order. For one warp.
template <typename Acc>
__device__ __forceinline__ void keep_from(const FirstFew<Acc>& few, typename FirstFew<Acc>::Word floor, int lane) {
    const int size = few.size();
    int kept = 0;
    for (int first = 0; first < size; first += kWarpSize) {
        const int i = first + lane;
        const auto word = i < size ? few.word[i] : 0;
        const int32_t token = i < size ? few.token[i] : 0;
        const bool stays = i < size && word >= floor;
        const unsigned stayers = __ballot_sync(kWholeWarp, stays);  // and all have read
        if (stays) {
            const int place = kept + __popc(stayers & ((1U << lane) - 1));
            few.word[place] = word;
            few.token[place] = token;
        }
        kept += __popc(stayers);
        __syncwarp();
    }
    if (lane == 0) *few.floor = {floor, -1, kept};
    __syncwarp();
}

// Makes room: raises the floor to a word that keeps at least what is wanted and at most half as much again as there is
// room for beyond that. Where so many share one word that none does, what is wanted is kept exactly. For one warp.
template <typename Acc>
__device__ void shrink(const FirstFew<Acc>& few, const TokenRanking<Acc>& ranking, int lane) {
    using Word = typename FirstFew<Acc>::Word;
    const int size = few.size();
    const int most = few.wanted + (few.room - few.wanted) / 2;
    Word low = ~Word(0), high = 0;
    for (int i = lane; i < size; i += kWarpSize) {
        low = min(low, few.word[i]);
        high = max(high, few.word[i]);
    }
    low = warp_min(low);
    high = warp_max(high);
    while (low < high) {  // more than `most` have at least `low`, less than what is wanted have more than `high`
        const Word middle = low + (high - low) / 2;
        int above = 0;
        for (int i = lane; i < size; i += kWarpSize)
            above += few.word[i] > middle;
        above = warp_sum(above);
        if (above >= few.wanted && above <= most) return keep_from(few, middle + 1, lane);
        if (above < few.wanted) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    sort_few(few, ranking, WarpTeam());
    if (lane == 0) *few.floor = {few.word[few.wanted - 1], few.token[few.wanted - 1], few.wanted};
    __syncwarp();
}

}  // namespace moetrain
