// Decides each expert's rows from what all ranks offer, and writes this rank's part of the rounded list. A warp per
// expert merges the ranks' offers, each lane at the head of some; blocks per expert then write its pairs, each at the
// place that the few tokens which come or go before it leave it. For balance, one warp first runs over all cells in
// order, adding up the residual. Compiled for sm_80 and sm_90a.
// Gate: 88 registers; LDG STG.
#include <algorithm>

#include "cuda/rounding/first_few.cuh"
#include "cuda/rounding/offer_pairs.h"
#include "cuda/rounding/round_pairs.h"

namespace moetrain {
namespace {

constexpr int kThreads = 256;
constexpr int kWarpsToDecide = 4;
constexpr int kBlocksToDecide = 4;        // on a multiprocessor: left to itself, ptxas spares registers and spills
constexpr int64_t kTokensOfBlock = 8192;  // where one expert has them all

// What balance knows of this rank's cells beforehand.
struct Surplus {
    int32_t* step_EW;    // each cell by expert and holder: what goes down, negative where it cannot go up, or 0
    int32_t* slot_E;     // which of an expert's cells is this rank's
    int64_t* before_EW;  // rows added so far, less those dropped
};

// Block (expert): its cells, holders ascending, at as many places from the first as ranks send to lower holders. The
// lowest rank that sends to a holder writes its cell.
__global__ void cells_kernel(const RoundInput in, const Surplus surplus) {
    const int64_t e = blockIdx.x;
    int32_t* step = surplus.step_EW + e * in.world;
    for (int64_t w = threadIdx.x; w < in.world; w += blockDim.x)
        step[w] = 0;
    __syncthreads();
    for (int64_t w = threadIdx.x; w < in.world; w += blockDim.x) {
        const int64_t holder = in.holder_of(w, e);
        int32_t slot = 0;
        bool is_lowest = true;
        for (int64_t other = 0; other < in.world; ++other) {
            slot += in.holder_of(other, e) < holder;
            is_lowest = is_lowest && (other >= w || in.holder_of(other, e) != holder);
        }
        if (w == in.rank) surplus.slot_E[e] = slot;
        if (!is_lowest) continue;
        const RoundCell cell = in.cell_of(e, holder);
        if (!cell.is_rounded(in.tile)) continue;
        const auto over = static_cast<int32_t>(cell.over(in.tile));
        step[slot] = cell.under(in.tile) <= cell.candidates ? over : -over;
    }
}

// One warp, 32 cells at a time: only those that are rounded take a turn.
__global__ void surplus_kernel(const Surplus surplus, int64_t num_cells, int64_t tile) {
    const int lane = threadIdx.x;
    int64_t sum = 0;
    int32_t next = lane < num_cells ? surplus.step_EW[lane] : 0;
    for (int64_t first = 0; first < num_cells; first += kWarpSize) {
        const int32_t step = next;
        const int64_t ahead = first + kWarpSize + lane;
        next = ahead < num_cells ? surplus.step_EW[ahead] : 0;
        int64_t before = sum;
        for (unsigned left = __ballot_sync(kWholeWarp, step != 0); left != 0; left &= left - 1) {
            const int turn = __ffs(static_cast<int>(left)) - 1;
            const int64_t its_step = __shfl_sync(kWholeWarp, step, turn);
            const int64_t over = its_step < 0 ? -its_step : its_step;
            if (lane == turn) before = sum;
            sum += its_step > 0 && balance_goes_up(sum, over, tile - over) ? tile - over : -over;
        }
        if (first + lane < num_cells) surplus.before_EW[first + lane] = before;
    }
}

// The best offer that a lane sees: (key, sequence, position), and whose it is.
struct Head {
    int64_t entry[OfferRow::kEntry];
    int64_t from;  // -1: none
};

// Whether a is taken before b; of equals, the lower rank's.
__device__ __forceinline__ bool is_taken_before(const Head& a, const Head& b, int64_t side) {
    if (a.from < 0 || b.from < 0) return a.from >= 0;
    if (side == OfferRow::kFill ? wins(a.entry, b.entry) : wins(b.entry, a.entry)) return true;
    if (side == OfferRow::kFill ? wins(b.entry, a.entry) : wins(a.entry, b.entry)) return false;
    return a.from < b.from;
}

// The best of what the ranks first, first + step, ... have left.
__device__ __forceinline__ Head head_of(const RoundInput& in, int64_t e, int64_t holder, int64_t side, int64_t first,
                                        int64_t step, const int32_t* used) {
    Head best{{0, 0, 0}, -1};
    for (int64_t from = first; from < in.world; from += step) {
        if (in.holder_of(from, e) != holder) continue;
        const OfferRow row = in.offers_of(from, e);
        if (used[from] >= min(row.length(side), in.tile)) continue;
        const int64_t* entry = row.entry(side, used[from]);
        const Head head{{entry[0], entry[1], entry[2]}, from};
        if (is_taken_before(head, best, side)) best = head;
    }
    return best;
}

struct Taken {
    int64_t mine;
    double sum;  // of all scores taken, in the order taken
};

// Takes the first `count` offers on one side, as if all ranks' were one sorted list. For one warp; `used` has room for
// a number per rank. The ranks are dealt to `lanes` lanes, a power of two, and the others do as these do.
__device__ __forceinline__ Taken take(const RoundInput& in, int64_t e, int64_t holder, int64_t side, int64_t count,
                                      int lane, int lanes, int32_t* used) {
    for (int64_t from = lane; from < in.world; from += kWarpSize)
        used[from] = 0;
    __syncwarp();
    const int64_t seat = lane % lanes;
    Taken taken{0, 0};
    Head head = head_of(in, e, holder, side, seat, lanes, used);
    for (int64_t i = 0; i < count; ++i) {
        Head best = head;
        for (int step = 1; step < lanes; step *= 2) {
            Head other;
            for (int k = 0; k < OfferRow::kEntry; ++k)
                other.entry[k] = __shfl_xor_sync(kWholeWarp, best.entry[k], step);
            other.from = __shfl_xor_sync(kWholeWarp, best.from, step);
            if (is_taken_before(other, best, side)) best = other;
        }
        if (best.from < 0) break;  // fillers whose scores are not finite were counted but not offered
        taken.mine += best.from == in.rank;
        taken.sum += score_of_key(best.entry[0], in.is_double);
        if (lane == best.from % lanes) ++used[best.from];
        __syncwarp();
        if (seat == best.from % lanes) head = head_of(in, e, holder, side, seat, lanes, used);
        __syncwarp();  // one lane is about to count on, where no other seat holds it up
    }
    return taken;
}

// A warp per expert.
__global__ void __launch_bounds__(kWarpsToDecide* kWarpSize, kBlocksToDecide)
    decide_kernel(const RoundInput in, const Surplus surplus, int lanes, int64_t* __restrict__ added_E,
                  int64_t* __restrict__ dropped_E) {
    extern __shared__ int32_t memory[];
    const int lane = threadIdx.x % kWarpSize;
    const int64_t num_warps = blockDim.x / kWarpSize;
    const int64_t e = blockIdx.x * num_warps + threadIdx.x / kWarpSize;
    if (e >= in.pairs.num_experts) return;
    int32_t* used = memory + threadIdx.x / kWarpSize * in.world;
    const int64_t holder = in.holder_of(in.rank, e);
    const RoundCell cell = in.cell_of(e, holder);
    bool up = false;
    int64_t mine = 0;
    if (cell.is_rounded(in.tile)) {
        const int64_t over = cell.over(in.tile), under = cell.under(in.tile);
        const bool by_score = in.rule == RoundRule::kNearestScore && under <= cell.candidates;
        RoundEvidence evidence;
        evidence.draw = counter_uniform(in.key, static_cast<uint64_t>(e));
        if (in.rule == RoundRule::kBalance) evidence.surplus = surplus.before_EW[e * in.world + surplus.slot_E[e]];
        Taken drop{0, 0};
        if (by_score) {
            drop = take(in, e, holder, OfferRow::kDrop, over, lane, lanes, used);
            const Taken fill = take(in, e, holder, OfferRow::kFill, under, lane, lanes, used);
            evidence.drop_sum = drop.sum;
            evidence.fill_sum = fill.sum;
            mine = fill.mine;
        }
        up = goes_up(in.rule, cell, in.tile, evidence);
        if (by_score) {
            if (!up) mine = drop.mine;
        } else {
            mine =
                take(in, e, holder, up ? OfferRow::kFill : OfferRow::kDrop, up ? under : over, lane, lanes, used).mine;
        }
    }
    if (lane != 0) return;
    added_E[e] = up ? mine : 0;
    dropped_E[e] = up ? 0 : mine;
}

// One warp: the sizes that are left, added up.
__global__ void offsets_kernel(const RoundInput in, const RoundOutput out) {
    const int lane = threadIdx.x;
    const int64_t num_experts = in.pairs.num_experts;
    if (lane == 0) out.offset_E1[0] = 0;
    int32_t before = 0;
    for (int64_t first = 0; first < num_experts; first += kWarpSize) {
        const int64_t e = first + lane;
        int32_t sum = 0;
        if (e < num_experts) {
            const int64_t change = out.added_E[e] - out.dropped_E[e];
            sum = in.pairs.offset[e + 1] - in.pairs.offset[e] + static_cast<int32_t>(change);
        }
        for (int step = 1; step < kWarpSize; step *= 2) {
            const int32_t lower = __shfl_up_sync(kWholeWarp, sum, step);
            if (lane >= step) sum += lower;
        }
        if (e < num_experts) out.offset_E1[e + 1] = before + sum;
        before += __shfl_sync(kWholeWarp, sum, kWarpSize - 1);
    }
}

// How many of the ascending list are below x.
__device__ __forceinline__ int32_t num_below(const int32_t* list, int32_t size, int32_t x) {
    int32_t begin = 0;
    while (begin < size) {
        const int32_t middle = begin + (size - begin) / 2;
        if (list[middle] < x) {
            begin = middle + 1;
        } else {
            size = middle;
        }
    }
    return begin;
}

// Block (expert, part): every so many of the expert's pairs, tokens ascending: the chosen that stay, and fillers.
__global__ void __launch_bounds__(kThreads) write_kernel(const RoundInput in, const RoundOutput out) {
    __shared__ int32_t moved[kMaxTileToRound];  // tokens that come or go, ascending
    const int64_t e = blockIdx.x, num_experts = in.pairs.num_experts;
    const bool adds = out.added_E[e] > 0;
    const auto num_moved = static_cast<int32_t>(adds ? out.added_E[e] : out.dropped_E[e]);
    const int32_t* offered = in.offer_token_E2M + (2 * e + (adds ? OfferRow::kFill : OfferRow::kDrop)) * in.tile;
    int size = 1;
    while (size < num_moved)
        size *= 2;
    for (int i = threadIdx.x; i < size; i += kThreads)
        moved[i] = i < num_moved ? offered[i] : INT32_MAX;
    __syncthreads();
    bitonic_sort(
        BlockTeam(), size, [&](int i, int j) { return moved[i] < moved[j]; },
        [&](int i, int j) {
            const int32_t token = moved[i];
            moved[i] = moved[j];
            moved[j] = token;
        });

    const int32_t begin = in.pairs.offset[e];
    const int32_t num_chosen = in.pairs.offset[e + 1] - begin;
    const int64_t target = out.offset_E1[e];
    const int32_t* chosen = in.pairs.token + begin;
    for (int64_t i = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; i < num_chosen;
         i += static_cast<int64_t>(gridDim.y) * kThreads) {
        const int32_t below = num_below(moved, num_moved, chosen[i]);
        if (!adds && below < num_moved && moved[below] == chosen[i]) continue;
        const int64_t place = target + i + (adds ? below : -below);
        out.token[place] = chosen[i];
        out.source[place] = static_cast<int32_t>(begin + i);
    }
    if (!adds || blockIdx.y > 0) return;
    for (int i = threadIdx.x; i < num_moved; i += kThreads) {
        const int64_t place = target + i + num_below(chosen, num_chosen, moved[i]);
        out.token[place] = moved[i];
        out.source[place] = static_cast<int32_t>(in.pairs.capacity + moved[i] * num_experts + e);
    }
}

}  // namespace

int64_t round_pairs_scratch_size(int64_t num_experts, int64_t world) { return num_experts * (2 * world + 1); }

cudaError_t launch_round_pairs(const RoundInput& in, const RoundOutput& out, int64_t* scratch, cudaStream_t stream) {
    const int64_t num_experts = in.pairs.num_experts, num_cells = num_experts * in.world;
    if (in.tile > kMaxTileToRound || in.world > kMaxWorldToRound) return cudaErrorInvalidConfiguration;
    const Surplus surplus{
        .step_EW = reinterpret_cast<int32_t*>(scratch + num_cells),
        .slot_E = reinterpret_cast<int32_t*>(scratch + 2 * num_cells),
        .before_EW = scratch,
    };
    const auto experts = static_cast<unsigned>(num_experts);
    const int64_t used_bytes = in.world * static_cast<int64_t>(sizeof(int32_t));
    if (in.rule == RoundRule::kBalance) {
        const auto threads = static_cast<unsigned>(std::clamp<int64_t>(in.world, kWarpSize, kThreads));
        const unsigned whole_warps = (threads + kWarpSize - 1) / kWarpSize * kWarpSize;
        cells_kernel<<<experts, whole_warps, 0, stream>>>(in, surplus);
        surplus_kernel<<<1, kWarpSize, 0, stream>>>(surplus, num_cells, in.tile);
    }
    int lanes = 1;
    while (lanes < in.world && lanes < kWarpSize)
        lanes *= 2;
    const int64_t warps = std::clamp<int64_t>(kMaxSharedBytes / used_bytes, 1, kWarpsToDecide);
    const auto blocks = static_cast<unsigned>((num_experts + warps - 1) / warps);
    decide_kernel<<<blocks, static_cast<unsigned>(warps * kWarpSize), static_cast<size_t>(warps * used_bytes),
                    stream>>>(in, surplus, lanes, out.added_E, out.dropped_E);
    offsets_kernel<<<1, kWarpSize, 0, stream>>>(in, out);

    const auto list_bytes = static_cast<size_t>(out.capacity) * sizeof(int32_t);
    for (int32_t* list : {out.token, out.source}) {  // zeros behind the last pair
        const cudaError_t status = cudaMemsetAsync(list, 0, list_bytes, stream);
        if (status != cudaSuccess) return status;
    }
    const auto parts = static_cast<unsigned>(std::clamp<int64_t>(in.pairs.num_tokens / kTokensOfBlock, 1, 8));
    write_kernel<<<dim3(experts, parts), kThreads, 0, stream>>>(in, out);
    return cudaGetLastError();
}

}  // namespace moetrain
