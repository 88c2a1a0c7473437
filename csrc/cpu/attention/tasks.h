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
struct AttentionTasks {
    using L = Layout<P, Wide>;
    using Store = typename P::Store;
    using Unit = typename P::Unit;
    using Acc = typename P::Acc;
    using Weight = typename Rows::Weight;
    using Seen = typename Rows::Seen;
    using Softmax = typename Rows::Softmax;
    using Problem = attention::Problem;
    using Heads = attention::Heads;
    static constexpr int64_t kQueries = attention::kQueries, kKeys = attention::kKeys, kNarrow = attention::kNarrow;
    // Queries whose scores exist at a time: whole tiles, and whole units.
    static constexpr int64_t kStep = Wide::kRows < Narrow::kRows ? Narrow::kRows : Wide::kRows;
    static_assert(kKeys == kPanel && Narrow::kColumns == kNarrow && kQueries % kStep == 0);
    static_assert(kStep % Wide::kRows == 0 && kStep % Narrow::kRows == 0);
    static_assert(kStep % (P::kPack * Wide::kUnitMultiple) == 0);

    struct Scratch {
        Unit *keys, *values;          // [key blocks][units of d][64]: columns are keys
        Unit *key_rows, *value_rows;  // [key blocks][panels][units of 64 keys][32]: columns are of d
        Unit *q, *dy;                 // [96][units of d]
        Unit *q_turned, *dy_turned;   // [d][units of 96 queries]
        Unit* block;                  // [units of 96 queries][64], on the way there
        Acc *scores, *products;       // [step][64]
        Weight* weights;              // [step][64], of the forward pass; of the backward pass slopes
        Unit *weight_panel, *slopes;  // [units of 96 queries][64]
        Acc* tile;                    // [rows][32 or 64]
        Acc *out, *lse, *delta;       // [96] rows of d, whole panels; [96]
        Acc *dk, *dv;                 // [key blocks][d, whole panels][64]
        int64_t bytes;
    };

    static Scratch cut(const Problem& p, void* memory) {
        int64_t used = 0;
        const auto take = [&]<typename T>(T*& to, int64_t count) {
            to = reinterpret_cast<T*>(static_cast<char*>(memory) + used);
            used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
        };
        const int64_t d_units = L::units(p.head_dim), d = whole_panels(p), units = L::units(kQueries);
        const int64_t rows = kQueries + kSlackRows, columns = round_up(p.head_dim, kPanel) + kSlackRows;
        Scratch s{};
        take(s.keys, p.key_blocks() * d_units * kKeys);
        take(s.values, p.key_blocks() * d_units * kKeys);
        take(s.key_rows, p.key_blocks() * L::units(kKeys) * d);
        take(s.value_rows, p.key_blocks() * L::units(kKeys) * d);
        take(s.q, rows * d_units);
        take(s.dy, rows * d_units);
        take(s.q_turned, columns * units);
        take(s.dy_turned, columns * units);
        take(s.block, units * kPanel);
        take(s.scores, kStep * kKeys);
        take(s.products, kStep * kKeys);
        take(s.weights, kStep * kKeys);
        take(s.weight_panel, units * kKeys);
        take(s.slopes, units * kKeys);
        take(s.tile, kStep * kPanel);
        take(s.out, kQueries * d);
        take(s.lse, kQueries);
        take(s.delta, kQueries);
        take(s.dk, p.key_blocks() * d * kKeys);
        take(s.dv, p.key_blocks() * d * kKeys);
        s.bytes = used;
        return s;
    }
    static int64_t scratch_bytes(const Problem& p) { return cut(p, nullptr).bytes; }
    static int64_t whole_panels(const Problem& p) { return p.value_panels() * kNarrow; }

    // Queries and keys of one task. Causal segments are square: query i is the token of key i.
    struct Segment {
        int64_t batch, query, num_queries, key, num_keys;
        const int32_t* first;  // of each query, or none
        bool causal;

        int64_t first_key(int64_t i) const { return first ? first[i] : 0; }
        // The block behind the last one that one of the queries up to i sees.
        int64_t end_block(int64_t i) const { return Problem::blocks_of(causal ? least(i + 1, num_keys) : num_keys); }
    };
    static Segment segment_of(const Problem& p, int64_t i) {
        if (!p.continues()) return {i, 0, p.length, 0, p.length, p.first + i * p.length, true};
        const int32_t *const q = p.range_q + 2 * i, *const k = p.range_k + 2 * i;
        return {0, q[0], q[1] - q[0], k[0], k[1] - k[0], nullptr, p.causal};
    }

    // One head of a segment's queries or keys.
    template <typename T>
    struct TokensOf {
        T* data;
        int64_t stride;
        T* operator[](int64_t token) const { return data + token * stride; }
    };
    using Tokens = TokensOf<Store>;
    template <typename T = Store>
    static TokensOf<T> tokens_of(const Heads& m, int64_t batch, int64_t begin, int64_t head) {
        return {static_cast<T*>(m.data) + batch * m.batch_stride + begin * m.token_stride + head * m.head_stride,
                m.token_stride};
    }
    template <typename T = Store>
    static TokensOf<T> queries_of(const Heads& m, const Segment& of, int64_t head) {
        return tokens_of<T>(m, of.batch, of.query, head);
    }
    template <typename T = Store>
    static TokensOf<T> keys_of(const Heads& m, const Segment& of, int64_t head) {
        return tokens_of<T>(m, of.batch, of.key, head);
    }
    static Acc* lse_of(const Problem& p, const Segment& of, int64_t head) {
        return static_cast<Acc*>(p.lse) + (of.batch * p.num_heads + head) * p.length + of.query;
    }

    // ---- operands -------------------------------------------------------------------------------------------------

    // Blocks of keys (or values) whose columns are tokens, for products over d.
    static void pack_tokens(const Problem& p, const Segment& of, const Tokens& tokens, Unit* to) {
        for (int64_t block = 0; block < Problem::blocks_of(of.num_keys); ++block) {
            const Store* rows[kKeys];
            for (int64_t j = 0; j < kKeys; ++j) {
                const int64_t token = block * kKeys + j;
                rows[j] = token < of.num_keys ? tokens[token] : nullptr;
            }
            L::pack_columns(rows, p.head_dim, to + block * L::units(p.head_dim) * kKeys);
        }
    }

    // Rows of a block of keys (or values) whose columns are of d, for products over tokens.
    static void pack_rows(const Problem& p, const Segment& of, const Tokens& tokens, int64_t begin, Unit* to) {
        for (int64_t panel = 0; panel < p.value_panels(); ++panel) {
            const int64_t valid = least(kNarrow, p.head_dim - panel * kNarrow);
            const auto row = [&](int64_t token) -> const Store* {
                return token < of.num_keys ? tokens[token] + panel * kNarrow : nullptr;
            };
            for (int64_t k = 0; k < L::units(kKeys); ++k) {
                const int64_t token = begin + k * P::kPack;
                L::template pack_row<kNarrow>(row(token), P::kPack == 2 ? row(token + 1) : nullptr, valid, to);
                to += kNarrow;
            }
        }
    }

    // Rows of queries that a tile product reads: in place where it can.
    static void stage(const Problem& p, const Tokens& tokens, int64_t begin, int64_t count, Unit* to,
                      const Unit** rows) {
        const int64_t units = L::units(p.head_dim);
        const bool in_place = L::whole_units(p.head_dim) && !Wide::kEvenRows;
        for (int64_t i = 0; i < count; ++i) {
            const Store* const row = tokens[begin + i];
            if (!in_place) L::copy_row(row, p.head_dim, to + i * units);
            rows[i] = in_place ? reinterpret_cast<const Unit*>(row) : to + i * units;
        }
    }

    // to[j] = element j of all queries, for products over queries.
    static void turn(const Problem& p, const Tokens& tokens, int64_t begin, int64_t count, const Scratch& s, Unit* to) {
        const Store* rows[kQueries];
        for (int64_t i = 0; i < kQueries; ++i)
            rows[i] = i < count ? tokens[begin + i] : nullptr;
        L::transpose(rows, kQueries, p.head_dim, s.block, to);
    }

    // ---- products ---------------------------------------------------------------------------------------------------

    // out[i][0 .. 64) = rows[i] times one block of tokens.
    static void multiply_tokens(const Problem& p, const Unit* const* rows, int64_t count, const Unit* block, Acc* out) {
        for (int64_t i = 0; i < count; i += Wide::kRows)
            Wide::multiply(rows + i, least(Wide::kRows, count - i), count - i, L::units(p.head_dim), block,
                           out + i * kKeys);
    }

    template <int64_t kColumns>
    static void add_tile(const Acc* tile, int64_t num_rows, Acc* to, int64_t stride) {
        for (int64_t r = 0; r < num_rows; ++r) {
            for (int64_t j = 0; j < kColumns; ++j)
                to[r * stride + j] += tile[r * kColumns + j];
        }
    }

    // out[i] += weights[i] times a block of keys or values whose columns are of d; weights from num_keys on are zero.
    static void add_keys(const Problem& p, const Scratch& s, int64_t count, int64_t num_keys, const Unit* packed,
                         Acc* out) {
        const Unit* rows[kStep];
        for (int64_t i = 0; i < kStep; ++i)
            rows[i] = reinterpret_cast<const Unit*>(s.weights + i * kKeys);
        for (int64_t panel = 0; panel < p.value_panels(); ++panel) {
            for (int64_t i = 0; i < count; i += Narrow::kRows) {
                const int64_t num_rows = least(Narrow::kRows, count - i);
                Narrow::multiply(rows + i, num_rows, count - i, L::units(num_keys),
                                 packed + panel * L::units(kKeys) * kNarrow, s.tile);
                add_tile<kNarrow>(s.tile, num_rows, out + i * whole_panels(p) + panel * kNarrow, whole_panels(p));
            }
        }
    }

    // out[j] += element j of the queries times a panel of their weights; units [begin, begin + k_units) of queries.
    static void add_queries(const Problem& p, const Scratch& s, const Unit* turned, int64_t begin, int64_t k_units,
                            const Unit* panel, Acc* out) {
        const Unit* rows[Wide::kRows];
        for (int64_t j = 0; j < p.head_dim; j += Wide::kRows) {
            const int64_t num_rows = least(Wide::kRows, p.head_dim - j);
            for (int64_t i = 0; i < Wide::kRows; ++i)
                rows[i] = turned + least(j + i, p.head_dim - 1) * L::units(kQueries) + begin;
            Wide::multiply(rows, num_rows, num_rows, k_units, panel + begin * kKeys, s.tile);
            add_tile<kKeys>(s.tile, num_rows, out + j * kKeys, kKeys);
        }
    }

    // ---- one block of scores ----------------------------------------------------------------------------------------

    static Seen seen_by(const Segment& of, int64_t query, int64_t key) {
        const int64_t left = least(kKeys, of.num_keys - key);
        return {static_cast<int32_t>(least(most(of.first_key(query) - key, 0), kKeys)),
                static_cast<int32_t>(of.causal ? most(least(query - key + 1, left), 0) : left)};
    }

    // Keys of a block up to the last one that one of the queries before `end` sees.
    static int64_t keys_seen(const Segment& of, int64_t end, int64_t key) {
        return least(kKeys, (of.causal ? least(end, of.num_keys) : of.num_keys) - key);
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
        const Segment of = segment_of(p, segment);
        pack_tokens(p, of, keys_of(p.k, of, key_head), s.keys);
        for (int64_t block = 0; block < Problem::blocks_of(of.num_keys); ++block)
            pack_rows(p, of, keys_of(p.v, of, key_head), block * kKeys, value_block(p, s.value_rows, block));
        for (int64_t head = key_head * p.group(); head < (key_head + 1) * p.group(); ++head) {
            for (int64_t query = 0; query < of.num_queries; query += kQueries)
                attend(p, s, of, head, query, least(kQueries, of.num_queries - query));
        }
    }

    static Unit* value_block(const Problem& p, Unit* rows, int64_t block) {
        return rows + block * L::units(kKeys) * whole_panels(p);
    }

    static void attend(const Problem& p, const Scratch& s, const Segment& of, int64_t head, int64_t query,
                       int64_t count) {
        const int64_t d = whole_panels(p);
        const Unit* q[kQueries];
        Softmax state[kQueries];
        stage(p, queries_of(p.q, of, head), query, count, s.q, q);
        for (int64_t i = 0; i < count * d; ++i)
            s.out[i] = 0;
        for (int64_t block = of.first_key(query) / kKeys; block < of.end_block(query + count - 1); ++block) {
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
                merge(p, s.out + i * d, state[i].largest, sum, queries_of<Acc>(p.y, of, head)[query + i], lse + i);
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
        const Segment of = segment_of(p, segment);
        const Tokens k = keys_of(p.k, of, key_head);
        const int64_t num_blocks = Problem::blocks_of(of.num_keys);
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
        for (int64_t block = of.first_key(query) / kKeys; block < of.end_block(query + count - 1); ++block) {
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
                add_head(p, s.out + i * d, queries_of<Acc>(p.dq, of, head)[query + i]);
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
        return p.continues() ? dot(p, queries_of<Acc>(p.y, of, head)[query], dy)
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
                    add_head(p, s.out + i * d, keys_of<Acc>(to, of, key_head)[token + i]);
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
