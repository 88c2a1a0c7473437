#include "planner/sequences/check.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

namespace moetrain::planner {
namespace {

std::string text(int64_t number) { return std::to_string(number); }

std::string broken_sizes(const SequencePlanView& p) {
    if (p.num_ranks < 1) return "there must be at least one rank";
    if (p.block < 1 || p.num_ranks % p.block != 0)
        return "block must divide the ranks, " + text(p.num_ranks) + ", got " + text(p.block);
    if (p.capacity < 0) return "capacity must be at least 0, got " + text(p.capacity);
    return "";
}

std::string broken_sequence(const SequencePlanView& p) {
    std::vector<int64_t> ids(p.num_sequences);
    for (int64_t i = 0; i < p.num_sequences; ++i) {
        const int64_t *const one = p.sequence_N3 + 3 * i, id = ids[i] = one[0];
        if (one[1] < 1) return "sequence " + text(id) + " must have at least 1 token, got " + text(one[1]);
        if (one[2] < 0 || one[2] > one[1])
            return "sequence " + text(id) + ": loss tokens must be between 0 and its " + text(one[1]) +
                   " tokens, got " + text(one[2]);
    }
    if (!std::is_sorted(ids.begin(), ids.end())) std::sort(ids.begin(), ids.end());
    const auto twice = std::adjacent_find(ids.begin(), ids.end());
    return twice == ids.end() ? "" : "sequence ids must be distinct, got " + text(*twice) + " twice";
}

std::string broken_offsets(const char* what, const int64_t* offset, int64_t num_items, int64_t total) {
    if (offset[0] != 0 || offset[num_items] != total)
        return std::string(what) + " must go from 0 to " + text(total) + ", got " + text(offset[0]) + " to " +
               text(offset[num_items]);
    for (int64_t i = 0; i < num_items; ++i) {
        if (offset[i] >= offset[i + 1])
            return "item " + text(i) + " must have sequences and ranks, but " + what + " goes from " + text(offset[i]) +
                   " to " + text(offset[i + 1]) + "; leave its lane empty instead";
    }
    return "";
}

std::string broken_coverage(const SequencePlanView& p) {
    std::vector<char> seen(p.num_sequences, 0);
    for (int64_t i = 0; i < p.num_sequences; ++i) {
        const int32_t member = p.member_N[i];
        if (member < 0 || member >= p.num_sequences)
            return "member " + text(i) + " must be one of the " + text(p.num_sequences) + " sequences, got " +
                   text(member);
        if (seen[member]++) return "sequence " + text(p.sequence_N3[3 * member]) + " is planned twice";
    }
    return "";  // as many members as sequences, none of them twice: all
}

std::string broken_numbers(const SequencePlanView& p) {
    for (int64_t i = 0; i < p.num_items; ++i) {
        if (!(p.offload_I[i] >= 0 && p.offload_I[i] <= 1))
            return "item " + text(i) + ": the offload ratio must be between 0 and 1, got " +
                   std::to_string(p.offload_I[i]);
        if (!(p.est_ms_I[i] >= 0 && std::isfinite(p.est_ms_I[i])))
            return "item " + text(i) + ": its time must be finite and at least 0, got " + std::to_string(p.est_ms_I[i]);
    }
    return "";
}

std::string broken_rounds(const SequencePlanView& p) {
    const int32_t least = p.num_sequences > 0 ? 1 : 0;
    for (int64_t rank = 0; rank < p.num_ranks; ++rank) {
        const int32_t rounds = p.rounds_R[rank], first = p.rounds_R[rank - rank % p.block];
        if (rounds < least)
            return "rank " + text(rank) + " must run at least " + text(least) + " rounds, got " + text(rounds);
        if (rounds != first)
            return "ranks of a block must run as many rounds, but rank " + text(rank) + " runs " + text(rounds) +
                   " and rank " + text(rank - rank % p.block) + " of its block " + text(first);
    }
    return "";
}

std::string broken_order(const SequencePlanView& p) {
    std::vector<int32_t> last(p.num_ranks, -1);
    for (int64_t i = 0; i < p.num_items; ++i) {
        int32_t before = -1;
        const int32_t rounds_of_first =
            p.rounds_R[std::clamp<int64_t>(p.rank_M[p.rank_offset_I1[i]], 0, p.num_ranks - 1)];
        for (int64_t m = p.rank_offset_I1[i]; m < p.rank_offset_I1[i + 1]; ++m) {
            const int32_t rank = p.rank_M[m];
            if (rank <= before)
                return "item " + text(i) + ": ranks must be distinct, ascending and >= 0, got " + text(rank) +
                       " after " + text(before);
            if (rank >= p.num_ranks)
                return "item " + text(i) + " names rank " + text(rank) + " of " + text(p.num_ranks);
            if (p.rounds_R[rank] != rounds_of_first)
                return "item " + text(i) + " joins blocks that run " + text(rounds_of_first) + " and " +
                       text(p.rounds_R[rank]) + " rounds; blocks that a gang joins must run as many";
            if (p.round_I[i] < 0 || p.round_I[i] >= p.rounds_R[rank])
                return "item " + text(i) + ": its round must be in [0, " + text(p.rounds_R[rank]) + "), got " +
                       text(p.round_I[i]);
            if (p.round_I[i] <= last[rank])
                return "rank " + text(rank) + ": item " + text(i) + " of round " + text(p.round_I[i]) +
                       " comes after round " + text(last[rank]) + "; rounds must ascend on each rank";
            before = rank, last[rank] = p.round_I[i];
        }
    }
    return "";
}

std::string broken_capacity(const SequencePlanView& p) {
    for (int64_t i = 0; i < p.num_items; ++i) {
        const int64_t d = p.rank_offset_I1[i + 1] - p.rank_offset_I1[i], begin = p.offset_I1[i],
                      end = p.offset_I1[i + 1];
        int64_t most = 0;  // a bound first: a rank has at most n / d + 2 tokens of n
        for (int64_t m = begin; m < end; ++m)
            most += p.num_tokens(p.member_N[m]) / d + (d == 1 ? 0 : 2);
        const auto fits = [&](int64_t tokens) {
            return kept_tokens(tokens, p.offload_I[i], p.num_layers) <= static_cast<double>(p.capacity) + 1e-6;
        };
        if (fits(most)) continue;
        for (int64_t place = 0; place < d; ++place) {
            int64_t held = 0;
            for (int64_t m = begin; m < end; ++m)
                held += share_of(p.num_tokens(p.member_N[m]), d, place);
            if (!fits(held))
                return "item " + text(i) + " gives rank " + text(p.rank_M[p.rank_offset_I1[i] + place]) + " " +
                       text(held) + " tokens, of which " + std::to_string(p.offload_I[i]) +
                       " may wait on the host; the capacity is " + text(p.capacity);
        }
    }
    return "";
}

}  // namespace

std::string broken_rule(const SequencePlanView& p) {
    std::string found = broken_sizes(p);
    if (found.empty()) found = broken_sequence(p);
    if (found.empty()) found = broken_offsets("offset", p.offset_I1, p.num_items, p.num_sequences);
    if (found.empty()) found = broken_offsets("rank_offset", p.rank_offset_I1, p.num_items, p.num_item_ranks);
    if (found.empty()) found = broken_coverage(p);
    if (found.empty()) found = broken_numbers(p);
    if (found.empty()) found = broken_rounds(p);
    if (found.empty()) found = broken_order(p);
    if (found.empty()) found = broken_capacity(p);
    return found;
}

}  // namespace moetrain::planner
