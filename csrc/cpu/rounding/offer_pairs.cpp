// Experts are taken in strips as wide as a cache line of scores. One pass over the tokens of a strip compares each row
// with the scores that still matter, 16 at a time; only chosen tokens and the few that enter a list cost more.
#include <ATen/Parallel.h>

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#include "common/clones.h"
#include "cpu/rounding/round_pairs.h"

namespace moetrain {
namespace {

constexpr int64_t kStrip = 16;

// Tokens by global id (sequence, position): `rank` of each token and `token` of each rank, empty where they are one.
struct TokenOrder {
    std::vector<int32_t> rank, token;

    TokenOrder(const int64_t* token_gid_T2, int64_t num_tokens) {
        const auto before = [&](int64_t a, int64_t b) { return comes_before(token_gid_T2, a, b); };
        bool ascending = true;
        for (int64_t t = 1; t < num_tokens && ascending; ++t)
            ascending = !before(t, t - 1);
        if (ascending) return;
        token.resize(num_tokens);
        rank.resize(num_tokens);
        std::iota(token.begin(), token.end(), 0);
        std::sort(token.begin(), token.end(), before);
        for (int64_t i = 0; i < num_tokens; ++i)
            rank[token[i]] = static_cast<int32_t>(i);
    }
    int32_t rank_of(int32_t t) const { return rank.empty() ? t : rank[t]; }
    int32_t token_at(int32_t i) const { return token.empty() ? i : token[i]; }
};

// A token's place in the order in which tokens win, as one whole number: more is better.
template <typename Acc>
struct Standing {
    using Word = std::conditional_t<std::is_same_v<Acc, float>, int64_t, __int128>;

    static Word of(Acc score, int32_t rank) {
        return (static_cast<Word>(offer_key(score)) << 32) | (UINT32_MAX - static_cast<uint32_t>(rank));
    }
    static int64_t key(Word word) { return static_cast<int64_t>(word >> 32); }
    static int32_t rank(Word word) { return static_cast<int32_t>(UINT32_MAX - static_cast<uint32_t>(word)); }
    static Acc score(Word word) { return static_cast<Acc>(score_of_key(key(word), std::is_same_v<Acc, double>)); }
};

// The first `limit` of what is added, in the order in which tokens win (kWinners), or in which they lose.
template <typename Acc, bool kWinners>
class FirstFew {
 public:
    using Word = typename Standing<Acc>::Word;

    explicit FirstFew(int64_t limit) : limit_(limit) { kept_.reserve(2 * limit); }

    // Scores on the wrong side of it need not be added.
    Acc bound() const { return bound_; }

    void add(Acc score, int32_t rank) {
        if (kWinners ? score < bound_ : score > bound_) return;
        kept_.push_back(Standing<Acc>::of(score, rank));
        if (static_cast<int64_t>(kept_.size()) < 2 * limit_) return;
        select();
        bound_ = Standing<Acc>::score(kept_.back());
    }

    const std::vector<Word>& sorted() {
        if (static_cast<int64_t>(kept_.size()) > limit_) select();
        std::sort(kept_.begin(), kept_.end(), Order());
        return kept_;
    }

 private:
    using Order = std::conditional_t<kWinners, std::greater<Word>, std::less<Word>>;

    // Keeps the first `limit`, the last of them at the end.
    void select() {
        std::nth_element(kept_.begin(), kept_.begin() + limit_ - 1, kept_.end(), Order());
        kept_.resize(limit_);
    }

    int64_t limit_;
    Acc bound_ = kWinners ? -std::numeric_limits<Acc>::max() : std::numeric_limits<Acc>::infinity();
    std::vector<Word> kept_;
};

// Bits of the experts of a strip that token t concerns: its score may enter the fillers, or it is the next chosen one.
template <typename Acc>
MOETRAIN_INLINE uint32_t concerned(const Acc* score, const Acc* floor, const int32_t* next, int32_t t) {
    uint32_t bits = 0;
    for (int64_t j = 0; j < kStrip; ++j)
        bits |= static_cast<uint32_t>((score[j] >= floor[j]) | (next[j] == t)) << j;
    return bits;
}

template <typename Acc>
struct Strip {
    int64_t first;  // expert
    int64_t width;
    std::vector<FirstFew<Acc, false>> drop;
    std::vector<FirstFew<Acc, true>> fill;

    Strip(const OfferInput<Acc>& in, int64_t first_expert)
        : first(first_expert), width(std::min(kStrip, in.pairs.num_experts - first_expert)) {
        for (int64_t j = 0; j < width; ++j) {
            drop.emplace_back(in.tile);
            fill.emplace_back(in.tile);
        }
    }
};

template <typename Acc>
MOETRAIN_INLINE void scan_tokens(const OfferInput<Acc>& in, const TokenOrder& order, Strip<Acc>& strip) {
    constexpr Acc kNever = std::numeric_limits<Acc>::infinity();
    alignas(64) Acc padded[kStrip], floor[kStrip];
    alignas(64) int32_t next[kStrip];
    const int32_t *place[kStrip], *end[kStrip];
    for (int64_t j = 0; j < kStrip; ++j) {
        padded[j] = -kNever;
        floor[j] = j < strip.width ? strip.fill[j].bound() : kNever;
        next[j] = -1;
        if (j >= strip.width) continue;
        place[j] = in.pairs.token + in.pairs.offset[strip.first + j];
        end[j] = in.pairs.token + in.pairs.offset[strip.first + j + 1];
        if (place[j] != end[j]) next[j] = *place[j];
    }
    for (int32_t t = 0; t < in.pairs.num_tokens; ++t) {
        const Acc* score = in.score_TE + t * in.stride + strip.first;
        if (strip.width < kStrip) {
            std::copy_n(score, strip.width, padded);
            score = padded;
        }
        for (uint32_t bits = concerned(score, floor, next, t); bits != 0; bits &= bits - 1) {
            const int64_t j = __builtin_ctz(bits);
            if (next[j] == t) {
                strip.drop[j].add(score[j], order.rank_of(t));
                next[j] = ++place[j] != end[j] ? *place[j] : -1;
            } else if ((in.valid_T == nullptr || in.valid_T[t]) && score[j] < kNever) {
                strip.fill[j].add(score[j], order.rank_of(t));
                floor[j] = strip.fill[j].bound();
            }
        }
    }
}

// The functions that exist once per instruction set: templates cannot be cloned, float is what must be fast.
MOETRAIN_CLONES void run_scan(const OfferInput<float>& in, const TokenOrder& order, Strip<float>& strip) {
    scan_tokens(in, order, strip);
}
void run_scan(const OfferInput<double>& in, const TokenOrder& order, Strip<double>& strip) {
    scan_tokens(in, order, strip);
}

template <typename Acc, typename Word>
void write_side(const OfferInput<Acc>& in, const TokenOrder& order, const std::vector<Word>& offered, int64_t side,
                int64_t* row, int32_t* token_2M) {
    row[2 + side] = static_cast<int64_t>(offered.size());
    int64_t* entry = row + OfferRow::kCounts + OfferRow::kEntry * side * in.tile;
    int32_t* token = token_2M + side * in.tile;
    for (const Word word : offered) {
        const int32_t t = order.token_at(Standing<Acc>::rank(word));
        entry[0] = Standing<Acc>::key(word);
        entry[1] = in.token_gid_T2[2 * t];
        entry[2] = in.token_gid_T2[2 * t + 1];
        entry += OfferRow::kEntry;
        *token++ = t;
    }
}

}  // namespace

int64_t first_unordered_expert(const PairList& pairs) {
    if (pairs.offset[0] != 0) return 0;
    for (int64_t e = 0; e < pairs.num_experts; ++e) {
        const int64_t begin = pairs.offset[e], end = pairs.offset[e + 1];
        if (end < begin || end > pairs.capacity) return e;
        bool ordered = true;
        for (int64_t n = begin + 1; n < end; ++n)
            ordered &= pairs.token[n - 1] < pairs.token[n];
        if (!ordered || (begin < end && (pairs.token[begin] < 0 || pairs.token[end - 1] >= pairs.num_tokens))) return e;
    }
    return -1;
}

template <typename Acc>
void offer_pairs_kernel(const OfferInput<Acc>& in, int64_t* offers_EX, int32_t* token_E2M) {
    const int64_t num_experts = in.pairs.num_experts, num_tokens = in.pairs.num_tokens;
    const auto num_valid_in = [&](const int32_t* begin, const int32_t* end) -> int64_t {
        return in.valid_T == nullptr ? end - begin
                                     : std::count_if(begin, end, [&](int32_t t) { return in.valid_T[t]; });
    };
    const int64_t num_valid =
        in.valid_T == nullptr ? num_tokens : std::count(in.valid_T, in.valid_T + num_tokens, true);
    const TokenOrder order(in.token_gid_T2, num_tokens);
    at::parallel_for(0, (num_experts + kStrip - 1) / kStrip, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            Strip<Acc> strip(in, i * kStrip);
            run_scan(in, order, strip);
            for (int64_t j = 0; j < strip.width; ++j) {
                const int64_t e = strip.first + j;
                int64_t* row = offers_EX + e * OfferRow::size(in.tile);
                int32_t* token_2M = token_E2M + e * 2 * in.tile;
                const int32_t *chosen = in.pairs.token + in.pairs.offset[e],
                              *end_chosen = in.pairs.token + in.pairs.offset[e + 1];
                row[0] = end_chosen - chosen;
                row[1] = num_valid - num_valid_in(chosen, end_chosen);
                write_side(in, order, strip.drop[j].sorted(), OfferRow::kDrop, row, token_2M);
                write_side(in, order, strip.fill[j].sorted(), OfferRow::kFill, row, token_2M);
            }
        }
    });
}

template void offer_pairs_kernel(const OfferInput<float>&, int64_t*, int32_t*);
template void offer_pairs_kernel(const OfferInput<double>&, int64_t*, int32_t*);

}  // namespace moetrain
