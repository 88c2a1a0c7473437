// Blocks of tokens are independent of one another: each has quotas of its own (common/assign_seats_math.h), so any
// number of threads gives the same seats. Inside a block tokens are served in order, greedily.
//
// A token wants experts 0, 1 and 2; the rank that it is on, 3, holds none of them, and quotas are not used up:
//
//     seats            expert 0: groups 0 1    expert 1: groups 1 2    expert 2: group 2
//     hits             group 0: 1    group 1: 2    group 2: 2
//     group 2 if it is on the token's node and group 1 is not, else group 1, the lower one: say 1 takes experts 0 and 1
//     hits             group 2: 1, which takes expert 2: two rows leave in place of three
#include "cpu/routing/assign_seats.h"

#include <algorithm>
#include <vector>

#include "common/assign_seats_math.h"
#include "cpu/common/tasks.h"

namespace moetrain {
namespace {

constexpr int32_t kUnseated = -1;

// How all pairs of one expert are divided.
struct Division {
    int64_t num_pairs, stride, turn, total;

    Division(const SeatProblem& in, int64_t expert)
        : num_pairs(in.offset[expert + 1] - in.offset[expert]),
          stride(0),
          turn(seat_turn(in.source, expert)),
          total(0) {
        if (num_pairs == 0) return;
        stride = seat_stride(num_pairs);
        for (int32_t z = in.seat_offset[expert]; z < in.seat_offset[expert + 1]; ++z)
            total += in.share[z];
    }
};

// One block at a time.
class Worker {
 public:
    Worker(const SeatProblem& in, const std::vector<Division>& divisions, int32_t* seat)
        : in_(in),
          divisions_(divisions),
          seat_(seat),
          quota_(in.seat_offset[in.num_experts], 0),
          hits_(in.num_groups, 0),
          first_(kSeatBlock + 1) {}

    void operator()(int64_t block) {
        const int64_t begin = block * kSeatBlock, end = std::min(begin + kSeatBlock, in_.num_tokens);
        collect(static_cast<int32_t>(begin), static_cast<int32_t>(end));
        for (int64_t t = 0; t < end - begin; ++t)
            serve(pairs_.data() + first_[t], pairs_.data() + first_[t + 1]);
    }

 private:
    struct Pair {
        int32_t expert, index;  // index: in the list of all pairs; kUnseated once it has a seat
    };

    // The pairs of tokens [begin, end), by token, and the quotas of their seats.
    void collect(int32_t begin, int32_t end) {
        std::fill(first_.begin(), first_.end(), 0);
        found_.clear();
        for (int64_t e = 0; e < in_.num_experts; ++e) {
            const int32_t *const list = in_.token + in_.offset[e], *const stop = in_.token + in_.offset[e + 1];
            const int32_t* const low = std::lower_bound(list, stop, begin);
            const int32_t* const high = std::lower_bound(low, stop, end);
            if (low == high) continue;
            set_quotas(e, low - list, high - list);
            for (const int32_t* at = low; at != high; ++at) {
                found_.push_back({static_cast<int32_t>(e), static_cast<int32_t>(at - in_.token)});
                ++first_[*at - begin + 1];
            }
        }
        for (int64_t t = 0; t < kSeatBlock; ++t)
            first_[t + 1] += first_[t];
        pairs_.resize(found_.size());
        std::vector<int32_t>& place = place_;
        place.assign(first_.begin(), first_.end() - 1);
        for (const Pair& pair : found_)  // experts ascend, and so they do inside each token
            pairs_[place[in_.token[pair.index] - begin]++] = pair;
    }

    // How many of an expert's pairs [low, high) stand where each seat's part of all of them is.
    void set_quotas(int64_t expert, int64_t low, int64_t high) {
        const Division& d = divisions_[expert];
        const int32_t first = in_.seat_offset[expert], stop = in_.seat_offset[expert + 1];
        bound_.clear();
        int64_t before = 0;
        for (int32_t z = first; z < stop; ++z) {
            quota_[z] = 0;
            before += in_.share[z];
            bound_.push_back(seat_bound(d.num_pairs, before, d.total, d.turn));
        }
        for (int64_t i = low; i < high; ++i) {
            const int64_t place = i * d.stride % d.num_pairs;
            ++quota_[first + (std::upper_bound(bound_.begin(), bound_.end(), place) - bound_.begin())];
        }
    }

    void serve(Pair* begin, Pair* end) {
        int64_t left = (end - begin) - seat_at(static_cast<int32_t>(in_.source), begin, end);
        while (left > 0) {
            const int32_t best = most_wanted(begin, end);
            left -= seat_at(best, begin, end);
        }
    }

    // Seats all pairs that `holder` can take; returns how many.
    int64_t seat_at(int32_t holder, Pair* begin, Pair* end) {
        int64_t taken = 0;
        for (Pair* pair = begin; pair != end; ++pair) {
            if (pair->index == kUnseated) continue;
            const int32_t *const first = in_.holder + in_.seat_offset[pair->expert],
                                 *const stop = in_.holder + in_.seat_offset[pair->expert + 1];
            const int32_t* const at = std::lower_bound(first, stop, holder);
            if (at == stop || *at != holder) continue;
            const int64_t z = at - in_.holder;
            if (quota_[z] == 0) continue;
            --quota_[z];
            seat_[pair->index] = static_cast<int32_t>(z);
            pair->index = kUnseated;
            ++taken;
        }
        return taken;
    }

    int32_t most_wanted(const Pair* begin, const Pair* end) {
        touched_.clear();
        for (const Pair* pair = begin; pair != end; ++pair) {
            if (pair->index == kUnseated) continue;
            for (int32_t z = in_.seat_offset[pair->expert]; z < in_.seat_offset[pair->expert + 1]; ++z) {
                if (quota_[z] == 0) continue;
                if (hits_[in_.holder[z]]++ == 0) touched_.push_back(in_.holder[z]);
            }
        }
        const int64_t home = in_.source / in_.domain_size;
        SeatCandidate best{0, false, 0};
        for (const int32_t holder : touched_) {
            const SeatCandidate candidate{hits_[holder], holder / in_.domain_size == home, holder};
            if (candidate.beats(best)) best = candidate;
            hits_[holder] = 0;
        }
        return best.holder;
    }

    const SeatProblem& in_;
    const std::vector<Division>& divisions_;
    int32_t* seat_;
    std::vector<int32_t> quota_;  // [Z], left in this block
    std::vector<int32_t> hits_;   // [G], zero between tokens
    std::vector<int32_t> first_, place_, touched_;
    std::vector<int64_t> bound_;
    std::vector<Pair> found_, pairs_;
};

}  // namespace

SeatFault first_seat_fault(const SeatProblem& in, int64_t num_pairs, int64_t num_seats) {
    const auto ascends = [&](const int32_t* offset, int64_t end) {
        return offset[0] == 0 && offset[in.num_experts] <= end;
    };
    if (!ascends(in.offset, num_pairs))
        return {"offset must begin at 0 and end within the pairs", in.offset[in.num_experts]};
    if (!ascends(in.seat_offset, num_seats))
        return {"seat_offset must begin at 0 and end within the seats", in.seat_offset[in.num_experts]};
    for (int64_t e = 0; e < in.num_experts; ++e) {
        if (in.offset[e] > in.offset[e + 1]) return {"offset must ascend", in.offset[e + 1], e};
        if (in.seat_offset[e] > in.seat_offset[e + 1]) return {"seat_offset must ascend", in.seat_offset[e + 1], e};
        int32_t before = -1;
        for (int32_t i = in.offset[e]; i < in.offset[e + 1]; before = in.token[i++]) {
            if (in.token[i] <= before || in.token[i] >= in.num_tokens)
                return {"tokens must be below num_tokens and ascend inside an expert", in.token[i], e};
        }
        int64_t total = 0;
        before = -1;
        for (int32_t z = in.seat_offset[e]; z < in.seat_offset[e + 1]; before = in.holder[z++]) {
            if (in.holder[z] <= before || in.holder[z] >= in.num_groups)
                return {"holders must be below num_groups and ascend inside an expert", in.holder[z], e};
            if (in.share[z] < 0) return {"shares must be at least 0", in.share[z], e};
            total += in.share[z];
        }
        if (total > kMaxShares) return {"an expert's shares must add up to at most 2^24", total, e};
        if (total == 0 && in.offset[e] < in.offset[e + 1]) return {"an expert with pairs must have a share", total, e};
    }
    return {};
}

void assign_seats_kernel(const SeatProblem& in, int32_t* seat) {
    std::vector<Division> divisions;
    divisions.reserve(in.num_experts);
    for (int64_t e = 0; e < in.num_experts; ++e)
        divisions.emplace_back(in, e);
    const int64_t num_blocks = (in.num_tokens + kSeatBlock - 1) / kSeatBlock;
    run_tasks(num_blocks, [&] { return Worker(in, divisions, seat); });
}

}  // namespace moetrain
