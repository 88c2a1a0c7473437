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

    // One head of one row of the batch.
    struct Tokens {
        Store* data;
        int64_t stride;
        Store* operator[](int64_t token) const { return data + token * stride; }
    };
    static Tokens tokens_of(const Heads& m, int64_t batch, int64_t head) {
        return {static_cast<Store*>(m.data) + batch * m.batch_stride + head * m.head_stride, m.token_stride};
    }

    // ---- operands -------------------------------------------------------------------------------------------------

    // Blocks of keys (or values) whose columns are tokens, for products over d.
    static void pack_tokens(const Problem& p, const Tokens& tokens, Unit* to) {
        for (int64_t block = 0; block < p.key_blocks(); ++block) {
            const Store* rows[kKeys];
            for (int64_t j = 0; j < kKeys; ++j) {
                const int64_t token = block * kKeys + j;
                rows[j] = token < p.length ? tokens[token] : nullptr;
            }
            L::pack_columns(rows, p.head_dim, to + block * L::units(p.head_dim) * kKeys);
        }
    }

    // Rows begin .. of at most `count` tokens whose columns are of d, for products over tokens.
    static void pack_rows(const Problem& p, const Tokens& tokens, int64_t begin, int64_t count, Unit* to) {
        for (int64_t panel = 0; panel < p.value_panels(); ++panel) {
            const int64_t valid = least(kNarrow, p.head_dim - panel * kNarrow);
            const auto row = [&](int64_t token) -> const Store* {
                return token < least(begin + count, p.length) ? tokens[token] + panel * kNarrow : nullptr;
            };
            for (int64_t k = 0; k < L::units(count); ++k) {
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

    static Seen seen_by(const Problem& p, const int32_t* first, int64_t query, int64_t key) {
        return {static_cast<int32_t>(least(most(first[query] - key, 0), kKeys)),
                static_cast<int32_t>(most(least(query - key + 1, least(kKeys, p.length - key)), 0))};
    }

    // The queries, of `count` from `query` on, that may see a key of a block: those before are earlier than it, those
    // after are of later documents. Begins with a whole step.
    struct Range {
        int64_t begin, end;
    };
    static Range seeing(const int32_t* first, int64_t query, int64_t count, int64_t key) {
        Range range{key <= query ? 0 : (key - query) / kStep * kStep, count};
        while (range.end > range.begin && first[query + range.end - 1] >= key + kKeys)
            --range.end;
        return range;
    }

    // ---- forward ----------------------------------------------------------------------------------------------------

    static void forward(const Problem& p, void* scratch, int64_t batch, int64_t key_head) {
        [[maybe_unused]] const typename Wide::Session session;
        const Scratch s = cut(p, scratch);
        pack_tokens(p, tokens_of(p.k, batch, key_head), s.keys);
        for (int64_t block = 0; block < p.key_blocks(); ++block)
            pack_rows(p, tokens_of(p.v, batch, key_head), block * kKeys, kKeys, value_block(p, s.value_rows, block));
        for (int64_t head = key_head * p.group(); head < (key_head + 1) * p.group(); ++head) {
            for (int64_t query = 0; query < p.length; query += kQueries)
                attend(p, s, batch, head, query, least(kQueries, p.length - query));
        }
    }

    static Unit* value_block(const Problem& p, Unit* rows, int64_t block) {
        return rows + block * L::units(kKeys) * whole_panels(p);
    }

    static void attend(const Problem& p, const Scratch& s, int64_t batch, int64_t head, int64_t query, int64_t count) {
        const int32_t* const first = p.first + batch * p.length;
        const int64_t d = whole_panels(p);
        const Unit* q[kQueries];
        Softmax state[kQueries];
        stage(p, tokens_of(p.q, batch, head), query, count, s.q, q);
        for (int64_t i = 0; i < count * d; ++i)
            s.out[i] = 0;
        for (int64_t block = first[query] / kKeys; block * kKeys < query + count; ++block) {
            const int64_t key = block * kKeys;
            const Range range = seeing(first, query, count, key);
            for (int64_t begin = range.begin; begin < range.end; begin += kStep) {
                const int64_t rows = least(kStep, range.end - begin);
                multiply_tokens(p, q + begin, rows, s.keys + block * L::units(p.head_dim) * kKeys, s.scores);
                for (int64_t i = 0; i < rows; ++i) {
                    const Acc shrink =
                        Rows::weigh(s.scores + i * kKeys, static_cast<Acc>(p.scale),
                                    seen_by(p, first, query + begin + i, key), state[begin + i], s.weights + i * kKeys);
                    if (shrink != 1) multiply_row(s.out + (begin + i) * d, d, shrink);
                }
                add_keys(p, s, rows, least(kKeys, query + begin + rows - key), value_block(p, s.value_rows, block),
                         s.out + begin * d);
            }
        }
        for (int64_t i = 0; i < count; ++i) {
            const Acc sum = state[i].sum.sum();
            multiply_row(s.out + i * d, d, 1 / sum);
            store_head(p, s.out + i * d, tokens_of(p.y, batch, head)[query + i]);
            static_cast<Acc*>(p.lse)[(batch * p.num_heads + head) * p.length + query + i] =
                state[i].largest + logarithm(sum);
        }
    }

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

    static void backward(const Problem& p, void* scratch, int64_t batch, int64_t key_head) {
        [[maybe_unused]] const typename Wide::Session session;
        const Scratch s = cut(p, scratch);
        const Tokens k = tokens_of(p.k, batch, key_head);
        pack_tokens(p, k, s.keys);
        pack_tokens(p, tokens_of(p.v, batch, key_head), s.values);
        for (int64_t block = 0; block < p.key_blocks(); ++block)
            pack_rows(p, k, block * kKeys, kKeys, value_block(p, s.key_rows, block));
        for (int64_t i = 0; i < p.key_blocks() * whole_panels(p) * kKeys; ++i) {
            s.dk[i] = 0;
            s.dv[i] = 0;
        }
        for (int64_t head = key_head * p.group(); head < (key_head + 1) * p.group(); ++head) {
            for (int64_t query = 0; query < p.length; query += kQueries)
                attend_backward(p, s, batch, head, query, least(kQueries, p.length - query));
        }
        store_turned(p, s, s.dk, static_cast<Acc>(p.scale), tokens_of(p.dk, batch, key_head));
        store_turned(p, s, s.dv, 1, tokens_of(p.dv, batch, key_head));
    }

    static void attend_backward(const Problem& p, const Scratch& s, int64_t batch, int64_t head, int64_t query,
                                int64_t count) {
        const int32_t* const first = p.first + batch * p.length;
        const int64_t d = whole_panels(p);
        const Tokens q = tokens_of(p.q, batch, head), y = tokens_of(p.y, batch, head);
        const Tokens dy = tokens_of(p.dy, batch, head), dq = tokens_of(p.dq, batch, head);
        Staged queries;
        queries.first = first;
        queries.query = query;
        stage(p, q, query, count, s.q, queries.q);
        stage(p, dy, query, count, s.dy, queries.dy);
        turn(p, q, query, count, s, s.q_turned);
        turn(p, dy, query, count, s, s.dy_turned);
        const Acc* const lse = static_cast<const Acc*>(p.lse) + (batch * p.num_heads + head) * p.length + query;
        for (int64_t i = 0; i < kQueries; ++i) {
            s.lse[i] = i < count ? lse[i] : Acc(0);
            s.delta[i] = i < count ? dot(p, y[query + i], dy[query + i]) : Acc(0);
        }
        for (int64_t i = 0; i < count * d; ++i)
            s.out[i] = 0;
        for (int64_t block = first[query] / kKeys; block * kKeys < query + count; ++block) {
            const Range range = seeing(first, query, count, block * kKeys);
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
            store_head(p, s.out + i * d, dq[query + i]);
        }
    }

    // Queries from `query` on, and what their products read.
    struct Staged {
        const int32_t* first;  // of all queries
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
                of.seen[r] = seen_by(p, queries.first, query + i + r, block * kKeys);
            const int64_t unit = (begin + i) / P::kPack * kKeys;
            Rows::slopes(s.scores + i * kKeys, s.products + i * kKeys, static_cast<Acc>(p.scale), of,
                         {s.weights + i * kKeys, s.weight_panel + unit, s.slopes + unit});
        }
        add_keys(p, s, rows, least(kKeys, query + rows - block * kKeys), value_block(p, s.key_rows, block),
                 s.out + begin * whole_panels(p));
    }

    static Acc dot(const Problem& p, const Store* a, const Store* b) {
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
    static void store_turned(const Problem& p, const Scratch& s, const Acc* from, Acc factor, const Tokens& to) {
        const int64_t d = whole_panels(p);
        for (int64_t token = 0; token < p.length; token += kLanes) {
            const Acc* const columns = from + token / kKeys * d * kKeys + token % kKeys;
            for (int64_t c = 0; c < d; c += kLanes)
                turn_sums(columns + c * kKeys, s.out + c, d);
            for (int64_t i = 0; i < least(kLanes, p.length - token); ++i) {
                multiply_row(s.out + i * d, d, factor);
                store_head(p, s.out + i * d, to[token + i]);
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
