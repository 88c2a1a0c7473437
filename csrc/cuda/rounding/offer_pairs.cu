// What each expert would drop and admit first. One pass over the scores, whole sectors at a time: a block takes a strip
// of neighbouring experts and a slab of tokens, and keeps the best fillers of each expert. A block per expert and side
// then merges the slabs' fillers, or ranks the chosen ones, which it gathers. A bit per token and expert says who fills
// nothing. What is written does not depend on the order in which threads come, for the ranking has no ties. Compiled
// for sm_80 and sm_90a.
// Gate: 88 registers; LDG.
#include <algorithm>

#include "cuda/rounding/first_few.cuh"
#include "cuda/rounding/offer_pairs.h"

namespace moetrain {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 3;           // on a multiprocessor: left to itself, ptxas spares registers and spills
constexpr int kLoads = 4;            // in flight per thread
constexpr int64_t kMaxColumns = 16;  // experts of a strip: 64 bytes of a row of floats
constexpr int64_t kMinRoom = 64;
constexpr int64_t kMinTokensOfSlab = 256;
constexpr int64_t kWantedBlocks = 512;
constexpr int kBitsPerWord = 32;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t aligned(int64_t bytes) { return ceil_div(bytes, 16) * 16; }

// How the work is cut, from sizes alone.
struct OfferPlan {
    int32_t columns = 0;  // a power of two
    int32_t room = 0;     // of a list
    int64_t num_strips = 0;
    int64_t num_slabs = 0;
    int64_t slab = 0;  // tokens
    int64_t num_masks = 0;
};

template <typename Acc>
struct OfferScratch {
    using Word = typename FirstFew<Acc>::Word;
    Word* word;           // [slab, expert, room], as is token
    int32_t* token;       //
    int32_t* size;        // [slab, expert], as is candidates
    int32_t* candidates;  // tokens that could fill, their scores finite or not
    uint32_t* mask;       // [E / 32, T]: a bit where a token does not fill the expert
};

int64_t list_bytes(int64_t room, int64_t score_bytes) { return room * (score_bytes + 4); }
// A list's head and its counter of candidates.
int64_t head_bytes(int64_t score_bytes) { return (score_bytes == 8 ? 16 : 12) + 4; }

OfferPlan plan_of(int64_t num_tokens, int64_t num_experts, int64_t tile, int64_t score_bytes) {
    OfferPlan plan;
    int64_t room = kMinRoom;
    while (room < 2 * tile)
        room *= 2;
    int64_t columns = kMaxColumns;
    while (columns > 1 && columns * (list_bytes(room, score_bytes) + head_bytes(score_bytes)) > kMaxSharedBytes)
        columns /= 2;
    plan.columns = static_cast<int32_t>(columns);
    plan.room = static_cast<int32_t>(room);
    plan.num_strips = ceil_div(num_experts, columns);
    plan.num_masks = ceil_div(num_experts, kBitsPerWord);
    const int64_t at_least = std::max(kMinTokensOfSlab, 4 * tile);
    const int64_t most_slabs = ceil_div(num_tokens, at_least);
    plan.num_slabs = std::min(ceil_div(kWantedBlocks, plan.num_strips), most_slabs);
    plan.slab = plan.num_slabs == 0 ? 0 : ceil_div(num_tokens, plan.num_slabs);
    return plan;
}

template <typename Acc>
OfferScratch<Acc> scratch_of(const OfferPlan& plan, int64_t num_tokens, int64_t num_experts, char* memory) {
    OfferScratch<Acc> scratch;
    const int64_t num_lists = plan.num_slabs * num_experts;
    const auto take = [&](auto*& data, int64_t size) {
        data = reinterpret_cast<std::remove_reference_t<decltype(data)>>(memory);
        memory += aligned(size * static_cast<int64_t>(sizeof(*data)));
    };
    take(scratch.word, num_lists * plan.room);
    take(scratch.token, num_lists * plan.room);
    take(scratch.size, num_lists);
    take(scratch.candidates, num_lists);
    take(scratch.mask, plan.num_masks * num_tokens);
    return scratch;
}

__global__ void mask_invalid_kernel(const bool* __restrict__ valid, int64_t num_tokens, int64_t size,
                                    uint32_t* __restrict__ mask) {
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < size; i += stride)
        mask[i] = valid == nullptr || valid[i % num_tokens] ? 0 : ~0U;
}

// A thread per pair; its expert is the last whose offset is not beyond it.
__global__ void mask_chosen_kernel(const PairList pairs, uint32_t* __restrict__ mask) {
    const int64_t size = pairs.offset[pairs.num_experts];
    const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
    for (int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; n < size; n += stride) {
        int64_t e = 0, end = pairs.num_experts;  // offset[e] <= n < offset[end]
        while (end - e > 1) {
            const int64_t middle = (e + end) / 2;
            (pairs.offset[middle] <= n ? e : end) = middle;
        }
        atomicOr(mask + e / kBitsPerWord * pairs.num_tokens + pairs.token[n], 1U << (e % kBitsPerWord));
    }
}

// Appends the entries that `pending` has a bit of, as far as there is room; returns the bits of those left.
template <typename Acc>
__device__ __forceinline__ unsigned append_all(const FirstFew<Acc>& few, const TokenRanking<Acc>& ranking,
                                               const typename FirstFew<Acc>::Word (&word)[kLoads],
                                               const int32_t (&token)[kLoads], unsigned pending) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        if ((pending >> i & 1) == 0) continue;
        if (!few.may_enter(ranking, word[i], token[i]) || few.append(word[i], token[i])) pending &= ~(1U << i);
    }
    return pending;
}

// A block's lists, one for each column of a strip.
template <typename Acc>
struct StripLists {
    using Few = FirstFew<Acc>;
    char* memory;
    int32_t columns, room, wanted;

    __device__ __forceinline__ Few of(int column) const {
        auto* word = reinterpret_cast<typename Few::Word*>(memory);
        auto* floor = reinterpret_cast<typename Few::Floor*>(word + static_cast<int64_t>(columns) * room);
        auto* token = reinterpret_cast<int32_t*>(floor + columns);
        return {word + column * room, token + column * room, floor + column, room, wanted};
    }
    __device__ __forceinline__ int32_t* candidates() const { return of(columns).token; }
};

template <typename Acc>
struct Loaded {
    Acc score[kLoads];
    unsigned fills;  // a bit for each token that fills the expert, if its score is finite
};

// The scores of one expert, of tokens that are `step` apart.
template <typename Acc>
__device__ __forceinline__ Loaded<Acc> load_scores(const OfferInput<Acc>& in, const uint32_t* mask, int64_t e,
                                                   int64_t first, int64_t end, int step) {
    Loaded<Acc> loaded;
    loaded.fills = 0;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        const int64_t t = first + i * step;
        loaded.score[i] = 0;
        if (t >= end) continue;
        loaded.score[i] = in.score_TE[t * in.stride + e];
        loaded.fills |= (~mask[t] >> (e % kBitsPerWord) & 1) << i;
    }
    return loaded;
}

// A strip's lists to where the next kernel merges them, a warp for each.
template <typename Acc>
__device__ __forceinline__ void store_lists(const StripLists<Acc>& lists, const OfferPlan& plan,
                                            const OfferScratch<Acc>& scratch, int64_t num_experts) {
    for (int c = threadIdx.x / kWarpSize; c < plan.columns; c += kThreads / kWarpSize) {
        const int64_t expert = static_cast<int64_t>(blockIdx.x) * plan.columns + c;
        if (expert >= num_experts) break;
        const FirstFew<Acc> kept = lists.of(c);
        const int64_t list = blockIdx.y * num_experts + expert;
        for (int i = threadIdx.x % kWarpSize; i < kept.size(); i += kWarpSize) {
            scratch.word[list * plan.room + i] = kept.word[i];
            scratch.token[list * plan.room + i] = kept.token[i];
        }
        if (threadIdx.x % kWarpSize == 0) {
            scratch.size[list] = kept.size();
            scratch.candidates[list] = lists.candidates()[c];
        }
    }
}

// Block (strip, slab): the best fillers of each of its experts among its tokens, in any order.
template <typename Acc>
__global__ void __launch_bounds__(kThreads, kBlocks)
    scan_kernel(const OfferInput<Acc> in, const OfferPlan plan, const OfferScratch<Acc> scratch) {
    extern __shared__ __align__(16) char memory[];
    const StripLists<Acc> lists{memory, plan.columns, plan.room, static_cast<int32_t>(in.tile)};
    const TokenRanking<Acc> ranking{in.token_gid_T2, false};
    const int column = threadIdx.x % plan.columns;
    const int step = kThreads / plan.columns;
    const int64_t num_experts = in.pairs.num_experts;
    const int64_t e = static_cast<int64_t>(blockIdx.x) * plan.columns + column;
    const int64_t begin = static_cast<int64_t>(blockIdx.y) * plan.slab;
    const int64_t slab_end = min(begin + plan.slab, in.pairs.num_tokens);
    const int64_t end = e < num_experts ? slab_end : begin;  // columns beyond the last expert look at no token
    const uint32_t* mask = scratch.mask + e / kBitsPerWord * in.pairs.num_tokens;
    const FirstFew<Acc> few = lists.of(column);
    int32_t* candidates = lists.candidates();
    const int64_t row = threadIdx.x / plan.columns;
    if (row == 0) {
        few.reset();
        candidates[column] = 0;
    }
    __syncthreads();

    int32_t num_candidates = 0;
    Loaded<Acc> next = load_scores(in, mask, e, begin + row, end, step);
    for (int64_t first = begin; first < slab_end; first += kLoads * step) {
        typename FirstFew<Acc>::Word word[kLoads];
        int32_t token[kLoads];
        unsigned pending = 0;
        num_candidates += __popc(next.fills);
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const Acc score = next.score[i];
            word[i] = ranking.word_of(score);
            token[i] = static_cast<int32_t>(first + row + i * step);
            if (score - score == 0) pending |= next.fills & (1U << i);
        }
        next = load_scores(in, mask, e, first + row + kLoads * step, end, step);
        while (__syncthreads_or((pending = append_all(few, ranking, word, token, pending)) != 0)) {
            for (int c = threadIdx.x / kWarpSize; c < plan.columns; c += kThreads / kWarpSize)
                if (lists.of(c).is_crowded()) shrink(lists.of(c), ranking, threadIdx.x % kWarpSize);
            __syncthreads();
        }
    }
    if (num_candidates > 0) atomicAdd(candidates + column, num_candidates);
    __syncthreads();

    store_lists(lists, plan, scratch, num_experts);
}

// What a block ranks: entry i of the slabs' fillers, or of the chosen ones. Says whether there is one.
template <typename Acc>
__device__ __forceinline__ bool filler(const OfferPlan& plan, const OfferScratch<Acc>& scratch, int64_t num_experts,
                                       int64_t e, int64_t i, typename FirstFew<Acc>::Word* word, int32_t* token) {
    const int64_t list = i / plan.room * num_experts + e;
    const int64_t place = i % plan.room;
    if (place >= scratch.size[list]) return false;
    *word = scratch.word[list * plan.room + place];
    *token = scratch.token[list * plan.room + place];
    return true;
}

template <typename Acc>
__device__ __forceinline__ int64_t sum_candidates(const OfferPlan& plan, const OfferScratch<Acc>& scratch,
                                                  int64_t num_experts, int64_t e) {
    int64_t sum = 0;
    for (int64_t slab = 0; slab < plan.num_slabs; ++slab)
        sum += scratch.candidates[slab * num_experts + e];
    return sum;
}

// The first of a sorted list, as many as are wanted, to a side of an expert's row; beyond them, zeros.
template <typename Acc>
__device__ __forceinline__ void write_entries(const OfferInput<Acc>& in, const FirstFew<Acc>& few,
                                              const TokenRanking<Acc>& ranking, int64_t e, int64_t side,
                                              int64_t* __restrict__ offers_EX, int32_t* __restrict__ token_E2M) {
    const int32_t length = min(few.size(), few.wanted);
    int64_t* row = offers_EX + e * OfferRow::size(in.tile);
    if (threadIdx.x == 0) row[2 + side] = length;
    int64_t* entry = row + OfferRow::kCounts + OfferRow::kEntry * side * in.tile;
    int32_t* token = token_E2M + (2 * e + side) * in.tile;
    for (int i = threadIdx.x; i < few.wanted; i += kThreads) {
        const bool is_there = i < length;
        const int64_t t = is_there ? few.token[i] : 0;
        entry[OfferRow::kEntry * i] = is_there ? ranking.key_of(few.word[i]) : 0;
        entry[OfferRow::kEntry * i + 1] = is_there ? in.token_gid_T2[2 * t] : 0;
        entry[OfferRow::kEntry * i + 2] = is_there ? in.token_gid_T2[2 * t + 1] : 0;
        token[i] = static_cast<int32_t>(t);
    }
}

// Block (expert, side): ranks and writes what is offered; beyond that, zeros.
template <typename Acc>
__global__ void __launch_bounds__(kThreads, kBlocks)
    offer_kernel(const OfferInput<Acc> in, const OfferPlan plan, const OfferScratch<Acc> scratch,
                 int64_t* __restrict__ offers_EX, int32_t* __restrict__ token_E2M) {
    extern __shared__ __align__(16) char memory[];
    const auto wanted = static_cast<int32_t>(in.tile);
    const FirstFew<Acc> few = StripLists<Acc>{memory, 1, plan.room, wanted}.of(0);
    const int64_t e = blockIdx.x, side = blockIdx.y, num_experts = in.pairs.num_experts;
    const bool drops = side == OfferRow::kDrop;
    const TokenRanking<Acc> ranking{in.token_gid_T2, drops};
    const int64_t first_pair = in.pairs.offset[e];
    const int64_t num_chosen = in.pairs.offset[e + 1] - first_pair;
    const int64_t size = drops ? num_chosen : plan.num_slabs * plan.room;
    if (threadIdx.x == 0) few.reset();
    __syncthreads();

    for (int64_t first = threadIdx.x; first - threadIdx.x < size; first += kLoads * kThreads) {
        typename FirstFew<Acc>::Word word[kLoads];
        int32_t token[kLoads];
        unsigned pending = 0;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            const int64_t at = first + i * kThreads;
            if (at >= size) continue;
            bool is_there = true;
            if (drops) {
                token[i] = in.pairs.token[first_pair + at];
                word[i] = ranking.word_of(in.score_TE[token[i] * in.stride + e]);
            } else {
                is_there = filler(plan, scratch, num_experts, e, at, word + i, token + i);
            }
            pending |= static_cast<unsigned>(is_there) << i;
        }
        while (__syncthreads_or((pending = append_all(few, ranking, word, token, pending)) != 0)) {
            if (threadIdx.x < kWarpSize) shrink(few, ranking, threadIdx.x);
            __syncthreads();
        }
    }
    sort_few(few, ranking, BlockTeam());

    int64_t& count = offers_EX[e * OfferRow::size(in.tile) + side];
    if (threadIdx.x == 0) count = drops ? num_chosen : sum_candidates(plan, scratch, num_experts, e);
    write_entries(in, few, ranking, e, side, offers_EX, token_E2M);
}

unsigned blocks_for(int64_t size) {
    return static_cast<unsigned>(std::clamp<int64_t>(ceil_div(size, kThreads), 1, kMaxBlocks));
}

}  // namespace

int64_t offer_pairs_scratch_bytes(int64_t num_tokens, int64_t num_experts, int64_t tile, int64_t score_bytes) {
    const OfferPlan plan = plan_of(num_tokens, num_experts, tile, score_bytes);
    const int64_t num_lists = plan.num_slabs * num_experts;
    return aligned(num_lists * plan.room * score_bytes) + aligned(num_lists * plan.room * 4) +
           2 * aligned(num_lists * 4) + aligned(plan.num_masks * num_tokens * 4);
}

template <typename Acc>
cudaError_t launch_offer_pairs(const OfferInput<Acc>& in, int64_t* offers_EX, int32_t* token_E2M, void* memory,
                               cudaStream_t stream) {
    const int64_t num_tokens = in.pairs.num_tokens, num_experts = in.pairs.num_experts;
    const auto score_bytes = static_cast<int64_t>(sizeof(Acc));
    const OfferPlan plan = plan_of(num_tokens, num_experts, in.tile, score_bytes);
    if (in.tile > kMaxTileToRound) return cudaErrorInvalidConfiguration;
    const auto scratch = scratch_of<Acc>(plan, num_tokens, num_experts, static_cast<char*>(memory));
    const auto bytes = static_cast<size_t>(list_bytes(plan.room, score_bytes) + head_bytes(score_bytes));
    if (num_tokens > 0) {
        const int64_t num_masks = plan.num_masks * num_tokens;
        mask_invalid_kernel<<<blocks_for(num_masks), kThreads, 0, stream>>>(in.valid_T, num_tokens, num_masks,
                                                                            scratch.mask);
        mask_chosen_kernel<<<blocks_for(in.pairs.capacity), kThreads, 0, stream>>>(in.pairs, scratch.mask);
        const dim3 grid(static_cast<unsigned>(plan.num_strips), static_cast<unsigned>(plan.num_slabs));
        scan_kernel<Acc><<<grid, kThreads, plan.columns * bytes, stream>>>(in, plan, scratch);
    }
    const dim3 grid(static_cast<unsigned>(num_experts), 2);
    offer_kernel<Acc><<<grid, kThreads, bytes, stream>>>(in, plan, scratch, offers_EX, token_E2M);
    return cudaGetLastError();
}

template cudaError_t launch_offer_pairs(const OfferInput<float>&, int64_t*, int32_t*, void*, cudaStream_t);
template cudaError_t launch_offer_pairs(const OfferInput<double>&, int64_t*, int32_t*, void*, cudaStream_t);

}  // namespace moetrain
