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

constexpr int32_t kNone = -1;
constexpr int32_t kFewSeats = 16;

// How all pairs of each expert are divided.
struct Division {
    explicit Division(const SeatProblem& in)
        : stride(in.num_experts, 0), home_seat(in.num_experts, kNone), bound(in.seat_offset[in.num_experts], 0) {
        for (int64_t e = 0; e < in.num_experts; ++e) {
            const int32_t num_pairs = in.offset[e + 1] - in.offset[e];
            if (num_pairs > 0) divide(in, e, num_pairs);
        }
    }
    std::vector<int32_t> stride;
    std::vector<int32_t> home_seat;  // the source's own
    std::vector<int32_t> bound;      // [Z], the first place beyond each seat

 private:
    void divide(const SeatProblem& in, int64_t e, int32_t num_pairs) {
        stride[e] = seat_stride(num_pairs);
        int64_t total = 0, before = 0;
        for (int32_t z = in.seat_offset[e]; z < in.seat_offset[e + 1]; ++z)
            total += in.share[z];
        for (int32_t z = in.seat_offset[e]; z < in.seat_offset[e + 1]; ++z) {
            before += in.share[z];
            bound[z] = static_cast<int32_t>(seat_bound(num_pairs, before, total, seat_turn(in.source, e)));
            if (in.holder[z] == in.source) home_seat[e] = z;
        }
    }
};

// How many of an ascending list are at most x.
int32_t num_up_to(const int32_t* list, int32_t size, int32_t x) {
    if (size > kFewSeats) return static_cast<int32_t>(std::upper_bound(list, list + size, x) - list);
    int32_t count = 0;  // without a branch that nobody can foresee
    for (int32_t i = 0; i < size; ++i)
        count += list[i] <= x ? 1 : 0;
    return count;
}

// One block at a time, ascending.
class Worker {
 public:
    Worker(const SeatProblem& in, const Division& division, int32_t* seat)
        : in_(in),
          division_(division),
          seat_(seat),
          quota_(in.seat_offset[in.num_experts], 0),
          key_(in.num_groups),
          runs_(in.num_experts),
          first_(kSeatBlock + 1),
          touched_(in.num_groups + 1),
          entries_(quota_.size() + 1) {
        for (int64_t e = 0; e < in.num_experts; ++e)
            runs_[e] = {in.offset[e], in.offset[e]};
        for (int32_t group = 0; group < in.num_groups; ++group)
            key_[group] = SeatCandidate{0, in.is_near(group), group}.key();
    }

    void operator()(int64_t block) {
        const int64_t begin = block * kSeatBlock, end = std::min(begin + kSeatBlock, in_.num_tokens);
        collect(static_cast<int32_t>(begin), static_cast<int32_t>(end));
        int32_t at = 0;
        for (int64_t t = 0; t < end - begin; ++t) {  // placing the pairs has left each token's end in first_
            serve(pairs_.data() + at, pairs_.data() + first_[t]);
            at = first_[t];
        }
    }

 private:
    struct Run {
        int32_t low, high;
    };
    struct Pair {
        int32_t expert, index;                    // index: in the list of all pairs; kNone once it has a seat
        int32_t first_entry = 0, stop_entry = 0;  // its open seats, once home has taken what it could
    };
    struct Entry {
        int32_t holder, seat;  // holder: kNone once the pair has a seat
        Pair* pair;
    };

    // The pairs of tokens [begin, end), by token and then by expert, and the quotas of their seats.
    void collect(int32_t begin, int32_t end) {
        std::fill(first_.begin(), first_.end(), 0);
        int32_t num_pairs = 0;
        for (int64_t e = 0; e < in_.num_experts; ++e) {
            const int32_t *const list = in_.token + in_.offset[e], *const stop = in_.token + in_.offset[e + 1];
            const int32_t* low = in_.token + runs_[e].high;  // of the block before, a lower one
            if (low != stop && *low < begin) low = std::lower_bound(low, stop, begin);
            const int32_t* high = low;
            for (; high != stop && *high < end; ++high)
                ++first_[*high - begin + 1];
            runs_[e] = {static_cast<int32_t>(low - in_.token), static_cast<int32_t>(high - in_.token)};
            if (low != high) set_quotas(e, static_cast<int32_t>(low - list), static_cast<int32_t>(high - low));
            num_pairs += runs_[e].high - runs_[e].low;
        }
        for (int64_t t = 0; t < kSeatBlock; ++t)
            first_[t + 1] += first_[t];
        pairs_.resize(num_pairs);
        for (int64_t e = 0; e < in_.num_experts; ++e)
            for (int32_t i = runs_[e].low; i < runs_[e].high; ++i)
                pairs_[first_[in_.token[i] - begin]++] = {static_cast<int32_t>(e), i};
    }

    // How many of so many of an expert's pairs, from `low` on, stand where each seat's part of all of them is.
    void set_quotas(int64_t expert, int32_t low, int32_t count) {
        const int32_t all = in_.offset[expert + 1] - in_.offset[expert], stride = division_.stride[expert];
        const int32_t first = in_.seat_offset[expert], num_seats = in_.seat_offset[expert + 1] - first;
        std::fill_n(quota_.begin() + first, num_seats, 0);
        auto place = static_cast<int32_t>(int64_t{low} * stride % all);
        for (int32_t i = 0; i < count; ++i) {
            ++quota_[first + num_up_to(division_.bound.data() + first, num_seats, place)];
            place += stride;  // which is at most as much as there are
            if (place >= all) place -= all;
        }
    }

    void serve(Pair* begin, Pair* end) {
        auto left = static_cast<int32_t>(end - begin);
        for (Pair* pair = begin; pair != end; ++pair) {
            const int32_t z = division_.home_seat[pair->expert];
            if (z == kNone || quota_[z] == 0) continue;
            take(pair, z);
            --left;
        }
        if (left == 0) return;
        list_entries(begin, end);
        while (left > 0) {
            const SeatCandidate best = most_wanted();
            if (best.hits <= 1) break;  // no two of what is left share a holder, so that none waits for another
            left -= seat_at(best.holder);
        }
        for (Pair* pair = begin; pair != end; ++pair)
            if (pair->index != kNone) seat_alone(pair);
    }

    void take(Pair* pair, int32_t z) {
        --quota_[z];
        seat_[pair->index] = z;
        pair->index = kNone;
    }

    // The open seats of the pairs that are left, and how many each group holds of them. Whether a seat is open and a
    // group new, no processor foresees: both are written, and kept by counting on.
    void list_entries(Pair* begin, Pair* end) {
        Entry* entry = entries_.data();
        int32_t* touched = touched_.data();
        int64_t* const key = key_.data();
        for (Pair* pair = begin; pair != end; ++pair) {
            if (pair->index == kNone) continue;
            pair->first_entry = static_cast<int32_t>(entry - entries_.data());
            const int32_t stop = in_.seat_offset[pair->expert + 1];
            for (int32_t z = in_.seat_offset[pair->expert]; z < stop; ++z) {
                const int32_t holder = in_.holder[z];
                const bool is_open = quota_[z] > 0;
                *entry = {holder, z, pair};
                entry += is_open;
                *touched = holder;
                touched += is_open && key[holder] < SeatCandidate::kHit;
                key[holder] += is_open ? SeatCandidate::kHit : 0;
            }
            pair->stop_entry = static_cast<int32_t>(entry - entries_.data());
        }
        num_entries_ = static_cast<int32_t>(entry - entries_.data());
        num_touched_ = static_cast<int32_t>(touched - touched_.data());
    }

    SeatCandidate most_wanted() const {
        int64_t most = 0;
        for (int32_t i = 0; i < num_touched_; ++i)
            most = std::max(most, key_[touched_[i]]);
        return SeatCandidate::of_key(most);
    }

    // Seats all pairs that `holder` can take; returns how many.
    int32_t seat_at(int32_t holder) {
        int32_t taken = 0;
        for (int32_t i = 0; i < num_entries_; ++i) {
            if (entries_[i].holder != holder) continue;
            take(entries_[i].pair, entries_[i].seat);
            forget(*entries_[i].pair);
            ++taken;
        }
        return taken;
    }

    void seat_alone(Pair* pair) {
        const Entry* best = &entries_[pair->first_entry];
        for (int32_t i = pair->first_entry; i < pair->stop_entry; ++i)  // holders ascend
            if (in_.is_near(entries_[i].holder) && !in_.is_near(best->holder)) best = &entries_[i];
        take(pair, best->seat);
        forget(*pair);
    }

    void forget(const Pair& pair) {
        for (int32_t i = pair.first_entry; i < pair.stop_entry; ++i) {
            key_[entries_[i].holder] -= SeatCandidate::kHit;
            entries_[i].holder = kNone;
        }
    }

    const SeatProblem& in_;
    const Division& division_;
    int32_t* seat_;
    std::vector<int32_t> quota_;  // [Z], left in this block
    std::vector<int64_t> key_;    // [G], SeatCandidate's; without hits between tokens
    std::vector<Run> runs_;       // [E], of pairs in this block
    std::vector<int32_t> first_, touched_;
    std::vector<Entry> entries_;
    int32_t num_entries_ = 0, num_touched_ = 0;
    std::vector<Pair> pairs_;
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
    const Division division(in);
    run_tasks(in.num_blocks(), [&] { return Worker(in, division, seat); });
}

}  // namespace moetrain
