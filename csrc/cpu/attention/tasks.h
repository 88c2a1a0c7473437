// Causal attention inside documents, block by block with a running softmax (FlashAttention, arXiv 2205.14135 and
// 2307.08691): scores of a few queries and 64 keys exist at a time, and blocks that no query sees are skipped. Sums
// over queries are taken transposed, columns being keys, so that weights are a panel as they come. Included once per
// instruction set; see kernels.h.
//
// Eight tokens in documents of 3 and 5, in blocks of 4 queries and 2 keys (really 96 and 64): the first key that each
// query sees is 0 0 0 3 3 3 3 3. `x` is seen, `.` is in a block that is computed, the rest is skipped.
//
//            key  0 1   2 3   4 5   6 7
//     query 0     x .                        queries 0 to 3 begin with the block of the first one's first key
//           1     x x                        and end with the block of their own last key
//           2     x x   x .
//           3     . .   . x
//           ------------------------------
//           4           . x   x .
//           5           . x   x x
//           6           . x   x x   x .
//           7           . x   x x   x x

template <typename P, typename Wide, typename Narrow, typename Rows>
struct AttentionTasks : AttentionOperands<P, Wide, Narrow, Rows> {
    using Operands = AttentionOperands<P, Wide, Narrow, Rows>;
    using Operands::add_keys;
    using Operands::add_queries;
    using Operands::cut;
    using Operands::key_sums_of;
    using Operands::keys_of;
    using Operands::kKeys;
    using Operands::kNarrow;
    using Operands::kQueries;
    using Operands::kStep;
    using Operands::lse_of;
    using Operands::multiply_tokens;
    using Operands::pack_rows;
    using Operands::pack_tokens;
    using Operands::queries_of;
    using Operands::query_sums_of;
    using Operands::stage;
    using Operands::turn;
    using Operands::value_block;
    using Operands::whole_panels;
    using typename Operands::Acc;
    using typename Operands::Heads;
    using typename Operands::L;
    using typename Operands::Problem;
    using typename Operands::Scratch;
    using typename Operands::Segment;
    using typename Operands::Store;
    using typename Operands::Tokens;
    using typename Operands::Unit;
    using typename Operands::Weight;
    using Seen = typename Rows::Seen;
    using Softmax = typename Rows::Softmax;

    // ---- one block of scores ----------------------------------------------------------------------------------------

    static Seen seen_by(const Segment& of, int64_t query, int64_t key) {
        const int64_t left = least(kKeys, of.num_keys - key);
        return {static_cast<int32_t>(least(most(of.first_key(query) - key, 0), kKeys)),
                static_cast<int32_t>(of.causal ? most(least(query - key + 1, left), 0) : left)};
    }

    // Keys of a block up to the last one that one of the queries before `end` sees.
    static int64_t keys_seen(const Segment& of, int64_t end, int64_t key) {
        return least(kKeys, of.end_key(end) - key);
    }

    // The queries, of `count` from `query` on, that may see a key of a block: those before are earlier than it, those
    // after are of later documents. Begins with a whole step.
    struct Range {
        int64_t begin, end;
    };
    static Range seeing(const Segment& of, int64_t query, int64_t count, int64_t key) {
        Range range{!of.causal || key <= query ? 0 : (key - query) / kStep * kStep, count};
        while (range.end > range.begin && of.first_key(query + range.end - 1) >= key + kKeys)
            --range.end;
        return range;
    }

    // ---- forward ----------------------------------------------------------------------------------------------------

    static void forward(const Problem& p, void* scratch, int64_t segment, int64_t key_head) {
        [[maybe_unused]] const typename Wide::Session session;
        const Scratch s = cut(p, scratch);
        const Segment of = Segment::of(p, segment);
        pack_tokens(p, of, keys_of(p.k, of, key_head), s.keys);
        for (int64_t block = 0; block < of.num_blocks(); ++block)
            pack_rows(p, of, keys_of(p.v, of, key_head), block * kKeys, value_block(p, s.value_rows, block));
        for (int64_t head = key_head * p.group(); head < (key_head + 1) * p.group(); ++head) {
            for (int64_t query = 0; query < of.num_queries; query += kQueries)
                attend(p, s, of, head, query, least(kQueries, of.num_queries - query));
        }
    }

    static void attend(const Problem& p, const Scratch& s, const Segment& of, int64_t head, int64_t query,
                       int64_t count) {
        const int64_t d = whole_panels(p);
        const Unit* q[kQueries];
        Softmax state[kQueries];
        stage(p, queries_of(p.q, of, head), query, count, s.q, q);
        for (int64_t i = 0; i < count * d; ++i)
            s.out[i] = 0;
        for (int64_t block = of.first_key(query) / kKeys; block * kKeys < of.end_key(query + count); ++block) {
            const int64_t key = block * kKeys;
            const Range range = seeing(of, query, count, key);
            for (int64_t begin = range.begin; begin < range.end; begin += kStep) {
                const int64_t rows = least(kStep, range.end - begin);
                multiply_tokens(p, q + begin, rows, s.keys + block * L::units(p.head_dim) * kKeys, s.scores);
                for (int64_t i = 0; i < rows; ++i) {
                    const Acc shrink =
                        Rows::weigh(s.scores + i * kKeys, static_cast<Acc>(p.scale),
                                    seen_by(of, query + begin + i, key), state[begin + i], s.weights + i * kKeys);
                    if (shrink != 1) multiply_row(s.out + (begin + i) * d, d, shrink);
                }
                add_keys(p, s, rows, keys_seen(of, query + begin + rows, key), value_block(p, s.value_rows, block),
                         s.out + begin * d);
            }
        }
        Acc* const lse = lse_of(p, of, head) + query;
        for (int64_t i = 0; i < count; ++i) {
            const Acc sum = state[i].sum.sum();
            if (p.continues()) {
                merge(p, s.out + i * d, state[i].largest, sum, query_sums_of(p.y, of, head)[query + i], lse + i);
                continue;
            }
            multiply_row(s.out + i * d, d, 1 / sum);
            store_head(p, s.out + i * d, queries_of(p.y, of, head)[query + i]);
            lse[i] = state[i].largest + logarithm(sum);
        }
    }

    // A query's sums of weights exp(score - shift), and of values times these, join what it has seen before.
    static void merge(const Problem& p, const Acc* values, Acc shift, Acc sum, Acc* y, Acc* lse) {
        if (!(sum > 0) && sum == sum) return;  // it sees nothing here
        const Acc now = shift + logarithm(sum), before = *lse;
        const bool is_first = before == -Acc(__builtin_inf());
        const Acc largest = before > now ? before : now;
        const Acc old = is_first ? 0 : exponential(before - largest), fresh = exponential(now - largest);
        const Acc old_part = old / (old + fresh), part = fresh / (old + fresh) / sum;
        for (int64_t j = 0; j < p.head_dim; ++j)
            y[j] = (is_first ? 0 : old_part * y[j]) + part * values[j];
        *lse = is_first ? now : largest + logarithm(old + fresh);
    }

    static float exponential(float x) { return __builtin_expf(x); }
    static double exponential(double x) { return __builtin_exp(x); }

    static float logarithm(float x) { return __builtin_logf(x); }
    static double logarithm(double x) { return __builtin_log(x); }

    static void multiply_row(Acc* row, int64_t d, Acc factor) {
        for (int64_t j = 0; j < d; ++j)
            row[j] *= factor;
    }

    static void store_head(const Problem& p, const Acc* from, Store* to) {
        int64_t j = 0;
        for (; j + kNarrow <= p.head_dim; j += kNarrow)
            store_numbers<kNarrow, Wide>(from + j, to + j);
        for (; j < p.head_dim; ++j)
            store_number(from[j], to + j);
    }

    // ---- backward ---------------------------------------------------------------------------------------------------

    static void backward(const Problem& p, void* scratch, int64_t segment, int64_t key_head) {
        [[maybe_unused]] const typename Wide::Session session;
        const Scratch s = cut(p, scratch);
        const Segment of = Segment::of(p, segment);
        const Tokens k = keys_of(p.k, of, key_head);
        const int64_t num_blocks = of.num_blocks();
        pack_tokens(p, of, k, s.keys);
        pack_tokens(p, of, keys_of(p.v, of, key_head), s.values);
        for (int64_t block = 0; block < num_blocks; ++block)
            pack_rows(p, of, k, block * kKeys, value_block(p, s.key_rows, block));
        for (int64_t i = 0; i < num_blocks * whole_panels(p) * kKeys; ++i) {
            s.dk[i] = 0;
            s.dv[i] = 0;
        }
        for (int64_t head = key_head * p.group(); head < (key_head + 1) * p.group(); ++head) {
            for (int64_t query = 0; query < of.num_queries; query += kQueries)
                attend_backward(p, s, of, head, query, least(kQueries, of.num_queries - query));
        }
        store_turned(p, s, of, s.dk, static_cast<Acc>(p.scale), p.dk, key_head);
        store_turned(p, s, of, s.dv, 1, p.dv, key_head);
    }

    static void attend_backward(const Problem& p, const Scratch& s, const Segment& of, int64_t head, int64_t query,
                                int64_t count) {
        const int64_t d = whole_panels(p);
        const Tokens q = queries_of(p.q, of, head), dy = queries_of(p.dy, of, head);
        Staged queries;
        queries.of = &of;
        queries.query = query;
        stage(p, q, query, count, s.q, queries.q);
        stage(p, dy, query, count, s.dy, queries.dy);
        turn(p, q, query, count, s, s.q_turned);
        turn(p, dy, query, count, s, s.dy_turned);
        const Acc* const lse = lse_of(p, of, head) + query;
        for (int64_t i = 0; i < kQueries; ++i) {
            s.lse[i] = i < count ? lse[i] : Acc(0);
            s.delta[i] = i < count ? delta(p, of, head, query + i, dy[query + i]) : Acc(0);
        }
        for (int64_t i = 0; i < count * d; ++i)
            s.out[i] = 0;
        for (int64_t block = of.first_key(query) / kKeys; block * kKeys < of.end_key(query + count); ++block) {
            const Range range = seeing(of, query, count, block * kKeys);
            if (range.begin >= range.end) continue;
            for (int64_t begin = range.begin; begin < range.end; begin += kStep)
                slope(p, s, queries, begin, least(kStep, range.end - begin), block);
            const int64_t begin = range.begin / P::kPack, units = L::units(range.end - range.begin);
            for (int64_t i = (range.end + P::kPack - 1) / P::kPack * kKeys; i < (begin + units) * kKeys; ++i) {
                s.weight_panel[i] = 0;
                s.slopes[i] = 0;
            }
            add_queries(p, s, s.dy_turned, begin, units, s.weight_panel, s.dv + block * d * kKeys);
            add_queries(p, s, s.q_turned, begin, units, s.slopes, s.dk + block * d * kKeys);
        }
        for (int64_t i = 0; i < count; ++i) {
            multiply_row(s.out + i * d, d, static_cast<Acc>(p.scale));
            if (p.continues()) {
                add_head(p, s.out + i * d, query_sums_of(p.dq, of, head)[query + i]);
            } else {
                store_head(p, s.out + i * d, queries_of(p.dq, of, head)[query + i]);
            }
        }
    }

    static void add_head(const Problem& p, const Acc* from, Acc* to) {
        for (int64_t j = 0; j < p.head_dim; ++j)
            to[j] += from[j];
    }

    static Acc delta(const Problem& p, const Segment& of, int64_t head, int64_t query, const Store* dy) {
        return p.continues() ? dot(p, query_sums_of(p.y, of, head)[query], dy)
                             : dot(p, queries_of(p.y, of, head)[query], dy);
    }

    // Queries from `query` on, and what their products read.
    struct Staged {
        const Segment* of;
        int64_t query;
        const Unit *q[kQueries], *dy[kQueries];
    };

    // Queries [begin, begin + rows) and one block of keys: weights and slopes for the sums over queries, and the
    // queries' own gradient.
    static void slope(const Problem& p, const Scratch& s, const Staged& queries, int64_t begin, int64_t rows,
                      int64_t block) {
        const int64_t offset = block * L::units(p.head_dim) * kKeys, query = queries.query + begin;
        multiply_tokens(p, queries.q + begin, rows, s.keys + offset, s.scores);
        multiply_tokens(p, queries.dy + begin, rows, s.values + offset, s.products);
        for (int64_t i = 0; i < rows; i += P::kPack) {
            typename Rows::Queries of{.lse = s.lse + begin + i, .delta = s.delta + begin + i, .seen = {}};
            for (int64_t r = 0; r < P::kPack && i + r < rows; ++r)
                of.seen[r] = seen_by(*queries.of, query + i + r, block * kKeys);
            const int64_t unit = (begin + i) / P::kPack * kKeys;
            Rows::slopes(s.scores + i * kKeys, s.products + i * kKeys, static_cast<Acc>(p.scale), of,
                         {s.weights + i * kKeys, s.weight_panel + unit, s.slopes + unit});
        }
        add_keys(p, s, rows, keys_seen(*queries.of, query + rows, block * kKeys), value_block(p, s.key_rows, block),
                 s.out + begin * whole_panels(p));
    }

    template <typename T>
    static Acc dot(const Problem& p, const T* a, const Store* b) {
        Acc part[kLanes] = {};
        int64_t j = 0;
        for (; j + kLanes <= p.head_dim; j += kLanes) {
            for (int64_t l = 0; l < kLanes; ++l)
                part[l] += load_number(a[j + l]) * load_number(b[j + l]);
        }
        for (int64_t l = 0; j + l < p.head_dim; ++l)
            part[l] += load_number(a[j + l]) * load_number(b[j + l]);
        return Lanes<Acc>::load(part).sum();
    }

    // Stores factor times sums whose columns are tokens, 16 tokens at a time.
    static void store_turned(const Problem& p, const Scratch& s, const Segment& of, const Acc* from, Acc factor,
                             const Heads& to, int64_t key_head) {
        const int64_t d = whole_panels(p);
        for (int64_t token = 0; token < of.num_keys; token += kLanes) {
            const Acc* const columns = from + token / kKeys * d * kKeys + token % kKeys;
            for (int64_t c = 0; c < d; c += kLanes)
                turn_sums(columns + c * kKeys, s.out + c, d);
            for (int64_t i = 0; i < least(kLanes, of.num_keys - token); ++i) {
                multiply_row(s.out + i * d, d, factor);
                if (p.continues()) {
                    add_head(p, s.out + i * d, key_sums_of(to, of, key_head)[token + i]);
                } else {
                    store_head(p, s.out + i * d, keys_of(to, of, key_head)[token + i]);
                }
            }
        }
    }

    // to[i][j] = from[j][i], 16 by 16.
    static void turn_sums(const Acc* from, Acc* to, int64_t to_stride) {
        if constexpr (Wide::kTransposes && sizeof(Acc) == 4) {
            Wide::transpose_block(from, kKeys, to, to_stride);
        } else {
            for (int64_t i = 0; i < kLanes; ++i) {
                for (int64_t j = 0; j < kLanes; ++j)
                    to[i * to_stride + j] = from[j * kKeys + i];
            }
        }
    }
};
