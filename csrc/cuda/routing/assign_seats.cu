// Seats for each block of tokens, as csrc/cpu/routing/assign_seats.cpp explains them, in two kernels. First a block of
// threads per expert says how the expert's pairs are divided, and where each block of tokens begins in its list. Then a
// block of threads takes a block of tokens: all together count its quotas and note who chose whom, and one warp serves
// its tokens in order. A token's entries are the open seats of its experts, a lane each; how many entries each group
// has is kept up to date, so that nobody counts anew. Bound by the latency of a token's rounds.
// What a block of tokens needs lies in shared memory: 44 bytes per expert, 16 per seat and 4 per group. Beyond 48 KiB
// (512 experts, 1,400 seats and 1,024 groups fit) it lies in global scratch, where each step of a round takes longer.
// Compiled for sm_80 and sm_90a.
// Gate: 56 registers; LDG STG.
#include <algorithm>

#include "cuda/common/warp.cuh"
#include "cuda/routing/assign_seats.h"

namespace moetrain {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocksToSeat = 4;           // on a multiprocessor: left to itself, ptxas spares registers and spills
constexpr int kTeamSize = 8;               // threads that go through an expert's pairs in a block of tokens
constexpr int64_t kBlocksInScratch = 128;  // of threads, where their memory is global
constexpr int32_t kGone = -1;
constexpr int kWordBits = 32;

// How all pairs of each expert are divided.
struct Division {
    int32_t* stride_E;
    int32_t* bound_Z;   // the first place beyond each seat
    int32_t* begin_BE;  // [blocks of tokens + 1, E]: where they begin in each expert's list, counted from all lists'
};

// What a block of tokens needs. Zeros at its start.
struct Workspace {
    int32_t* next_E;    // each expert's first pair in the block that is not served
    int32_t* served_E;  // by which token's an expert's last pair was, counted from 1
    int32_t* choice_E;  // the best holder of an expert that is served alone
    int32_t* quota_Z;
    int32_t* hits_G;  // open seats of a token's experts, by group; zero between tokens
    int32_t* entry_seat_Z;
    int32_t* entry_holder_Z;
    int32_t* entry_expert_Z;
    int32_t* num_entries;
    uint32_t* chosen;  // [kSeatBlock, words]: a bit per expert

    static __host__ __device__ int64_t num_words(int64_t num_experts) {
        return (num_experts + kWordBits - 1) / kWordBits;
    }
    static __host__ __device__ int64_t size(const SeatProblem& in, int64_t num_seats) {
        return 3 * in.num_experts + 4 * num_seats + in.num_groups + 1 + kSeatBlock * num_words(in.num_experts);
    }
    __device__ Workspace(int32_t* memory, const SeatProblem& in, int64_t num_seats)
        : next_E(memory),
          served_E(next_E + in.num_experts),
          choice_E(served_E + in.num_experts),
          quota_Z(choice_E + in.num_experts),
          hits_G(quota_Z + num_seats),
          entry_seat_Z(hits_G + in.num_groups),
          entry_holder_Z(entry_seat_Z + num_seats),
          entry_expert_Z(entry_holder_Z + num_seats),
          num_entries(entry_expert_Z + num_seats),
          chosen(reinterpret_cast<uint32_t*>(num_entries + 1)) {}
};

// How many of an ascending list are below x.
__device__ __forceinline__ int32_t num_below(const int32_t* list, int32_t size, int64_t x) {
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

// One warp: bounds of an expert's seats, whose shares it adds up.
__device__ __forceinline__ void set_bounds(const SeatProblem& in, int64_t e, int64_t num_pairs, int32_t* bound_Z) {
    const int lane = threadIdx.x;
    const int32_t first = in.seat_offset[e], stop = in.seat_offset[e + 1];
    int32_t total = 0;
    for (int32_t z = first + lane; z < stop; z += kWarpSize)
        total += in.share[z];
    total = warp_sum(total);
    const int64_t turn = seat_turn(in.source, e);
    int32_t before = 0;
    for (int32_t begin = first; begin < stop; begin += kWarpSize) {
        const int32_t z = begin + lane;
        int32_t sum = z < stop ? in.share[z] : 0;
        for (int step = 1; step < kWarpSize; step *= 2) {
            const int32_t lower = __shfl_up_sync(kWholeWarp, sum, step);
            if (lane >= step) sum += lower;
        }
        if (z < stop) bound_Z[z] = static_cast<int32_t>(seat_bound(num_pairs, before + sum, total, turn));
        before += __shfl_sync(kWholeWarp, sum, kWarpSize - 1);
    }
}

// Block (expert).
__global__ void __launch_bounds__(kThreads) divide_kernel(const SeatProblem in, const Division out) {
    const int64_t e = blockIdx.x;
    const int32_t begin = in.offset[e], num_pairs = in.offset[e + 1] - begin;
    for (int64_t block = threadIdx.x; block <= in.num_blocks(); block += kThreads)
        out.begin_BE[block * in.num_experts + e] = begin + num_below(in.token + begin, num_pairs, block * kSeatBlock);
    if (num_pairs == 0 || threadIdx.x >= kWarpSize) return;
    set_bounds(in, e, num_pairs, out.bound_Z);
    if (threadIdx.x == 0) out.stride_E[e] = seat_stride(num_pairs);
}

// All threads: the quotas of a block of tokens, and each token's experts. A team's expert is nobody else's.
__device__ __forceinline__ void collect(const SeatProblem& in, const Division& by, const Workspace& at, int64_t block) {
    const int64_t num_experts = in.num_experts, num_words = Workspace::num_words(num_experts);
    const int member = threadIdx.x % kTeamSize;
    for (int64_t e = threadIdx.x / kTeamSize; e < num_experts; e += kThreads / kTeamSize) {
        const int32_t low = by.begin_BE[block * num_experts + e], high = by.begin_BE[(block + 1) * num_experts + e];
        if (low == high) continue;
        if (member == 0) at.next_E[e] = low;
        const int32_t list = in.offset[e], num_pairs = in.offset[e + 1] - list;
        const int32_t seat = in.seat_offset[e], num_seats = in.seat_offset[e + 1] - seat;
        const int64_t stride = by.stride_E[e];
        for (int32_t i = low + member; i < high; i += kTeamSize) {
            const int64_t place = (i - list) * stride % num_pairs;
            atomicAdd(at.quota_Z + seat + num_below(by.bound_Z + seat, num_seats, place + 1), 1);
            const int64_t token = in.token[i] - block * kSeatBlock;
            atomicOr(at.chosen + token * num_words + e / kWordBits, 1U << (e % kWordBits));
        }
    }
}

// One warp, which serves one token after another.
struct Server {
    const SeatProblem& in;
    const Workspace& at;
    int32_t* seat_N;
    int lane;

    // The open seats of a token's experts, in any order.
    __device__ __forceinline__ void list_entries(int64_t token) const {
        const int64_t num_words = Workspace::num_words(in.num_experts);
        if (lane == 0) *at.num_entries = 0;
        __syncwarp();
        for (int64_t word = 0; word < num_words; ++word) {
            if ((at.chosen[token * num_words + word] >> lane & 1) == 0) continue;
            const auto e = static_cast<int32_t>(word * kWordBits + lane);
            at.choice_E[e] = INT32_MAX;
            for (int32_t z = in.seat_offset[e]; z < in.seat_offset[e + 1]; ++z) {
                if (at.quota_Z[z] == 0) continue;
                const int32_t i = atomicAdd(at.num_entries, 1), holder = in.holder[z];
                at.entry_seat_Z[i] = z;
                at.entry_holder_Z[i] = holder;
                at.entry_expert_Z[i] = e;
                atomicAdd(at.hits_G + holder, 1);
            }
        }
        __syncwarp();
    }

    // Seats all that `holder` can take, and takes their experts' other entries off.
    __device__ __forceinline__ void seat_at(int32_t holder, int64_t token, int32_t num_entries) const {
        const auto served = static_cast<int32_t>(token + 1);
        for (int32_t i = lane; i < num_entries; i += kWarpSize) {
            const int32_t z = at.entry_seat_Z[i];
            if (z == kGone || at.entry_holder_Z[i] != holder) continue;
            const int32_t e = at.entry_expert_Z[i];  // holds one of its seats at most
            take(e, z);
            at.served_E[e] = served;
        }
        __syncwarp();
        for (int32_t i = lane; i < num_entries; i += kWarpSize) {
            if (at.entry_seat_Z[i] == kGone || at.served_E[at.entry_expert_Z[i]] != served) continue;
            at.entry_seat_Z[i] = kGone;
            atomicAdd(at.hits_G + at.entry_holder_Z[i], -1);
        }
        __syncwarp();
    }

    __device__ __forceinline__ void take(int32_t e, int32_t z) const {
        seat_N[at.next_E[e]++] = z;
        --at.quota_Z[z];
    }

    // The group that a token's experts go to next; no hits where no entry is left.
    __device__ __forceinline__ SeatCandidate most_wanted(int32_t num_entries) const {
        int64_t most = 0;
        for (int32_t i = lane; i < num_entries; i += kWarpSize) {
            if (at.entry_seat_Z[i] == kGone) continue;
            const int32_t holder = at.entry_holder_Z[i];
            most = max(most, SeatCandidate{at.hits_G[holder], in.is_near(holder), holder}.key());
        }
        SeatCandidate best = SeatCandidate::of_key(most);
        const int32_t rank = __reduce_max_sync(kWholeWarp, best.rank());
        best.holder = __reduce_min_sync(kWholeWarp, best.rank() == rank ? best.holder : INT32_MAX);
        best.hits = rank / 2;
        return best;
    }

    // In the order of choice of an expert whose holders are no other's: the near ones first.
    __device__ __forceinline__ int32_t place_of(int32_t holder) const {
        return in.is_near(holder) ? holder + INT32_MIN : holder;
    }

    // Seats all that is left, where no two experts share a holder, so that none waits for another.
    __device__ __forceinline__ void seat_alone(int32_t num_entries) const {
        for (int32_t i = lane; i < num_entries; i += kWarpSize)
            if (at.entry_seat_Z[i] != kGone)
                atomicMin(at.choice_E + at.entry_expert_Z[i], place_of(at.entry_holder_Z[i]));
        __syncwarp();
        for (int32_t i = lane; i < num_entries; i += kWarpSize) {
            if (at.entry_seat_Z[i] == kGone) continue;
            const int32_t e = at.entry_expert_Z[i], holder = at.entry_holder_Z[i];
            at.hits_G[holder] = 0;
            if (at.choice_E[e] == place_of(holder)) take(e, at.entry_seat_Z[i]);
        }
        __syncwarp();
    }

    __device__ __forceinline__ void serve(int64_t token) const {
        list_entries(token);
        const int32_t num_entries = *at.num_entries;
        SeatCandidate best{2, true, static_cast<int32_t>(in.source)};  // home comes first, whatever it has
        for (; best.hits > 1; best = most_wanted(num_entries))
            seat_at(best.holder, token, num_entries);
        if (best.hits == 1) seat_alone(num_entries);
    }
};

// Blocks of tokens, so many at a time as there are blocks of threads.
template <bool kIsShared>
__global__ void __launch_bounds__(kThreads, kBlocksToSeat)
    seat_kernel(const SeatProblem in, const Division by, int64_t num_seats, int32_t* scratch, int32_t* seat_N) {
    extern __shared__ int32_t shared_memory[];
    const int64_t size = Workspace::size(in, num_seats);
    int32_t* memory = kIsShared ? shared_memory : scratch + blockIdx.x * size;
    const Workspace at(memory, in, num_seats);
    for (int64_t block = blockIdx.x; block < in.num_blocks(); block += gridDim.x) {
        for (int64_t i = threadIdx.x; i < size; i += kThreads)
            memory[i] = 0;
        __syncthreads();
        collect(in, by, at, block);
        __syncthreads();
        if (threadIdx.x < kWarpSize) {
            const Server server{in, at, seat_N, static_cast<int>(threadIdx.x)};
            const int64_t num_tokens = min(kSeatBlock, in.num_tokens - block * kSeatBlock);
            for (int64_t token = 0; token < num_tokens; ++token)
                server.serve(token);
        }
        __syncthreads();
    }
}

bool fits_in_shared(const SeatProblem& in, int64_t num_seats) {
    return Workspace::size(in, num_seats) * static_cast<int64_t>(sizeof(int32_t)) <= kMaxSharedBytes;
}

int64_t num_seating_blocks(const SeatProblem& in, int64_t num_seats) {
    const int64_t most = fits_in_shared(in, num_seats) ? kMaxBlocks : std::min(kBlocksInScratch, kMaxBlocks);
    return std::min(in.num_blocks(), most);
}

int64_t division_size(const SeatProblem& in, int64_t num_seats) {
    return in.num_experts + num_seats + (in.num_blocks() + 1) * in.num_experts;
}

}  // namespace

int64_t assign_seats_scratch_size(const SeatProblem& in, int64_t num_seats) {
    const int64_t division = division_size(in, num_seats);
    if (fits_in_shared(in, num_seats)) return division;
    return division + num_seating_blocks(in, num_seats) * Workspace::size(in, num_seats);
}

cudaError_t launch_assign_seats(const SeatProblem& in, int64_t num_pairs, int64_t num_seats, int32_t* seat,
                                int32_t* scratch, cudaStream_t stream) {
    if (num_pairs == 0) return cudaSuccess;
    const auto list_bytes = static_cast<size_t>(num_pairs) * sizeof(int32_t);
    const cudaError_t status = cudaMemsetAsync(seat, 0xff, list_bytes, stream);  // -1
    if (status != cudaSuccess || in.num_experts == 0 || in.num_tokens == 0) return status;
    const Division by{
        .stride_E = scratch, .bound_Z = scratch + in.num_experts, .begin_BE = scratch + in.num_experts + num_seats};
    divide_kernel<<<static_cast<unsigned>(in.num_experts), kThreads, 0, stream>>>(in, by);

    const auto blocks = static_cast<unsigned>(num_seating_blocks(in, num_seats));
    if (fits_in_shared(in, num_seats)) {
        const auto bytes = static_cast<size_t>(Workspace::size(in, num_seats)) * sizeof(int32_t);
        seat_kernel<true><<<blocks, kThreads, bytes, stream>>>(in, by, num_seats, nullptr, seat);
    } else {
        int32_t* workspaces = scratch + division_size(in, num_seats);
        seat_kernel<false><<<blocks, kThreads, 0, stream>>>(in, by, num_seats, workspaces, seat);
    }
    return cudaGetLastError();
}

}  // namespace moetrain
