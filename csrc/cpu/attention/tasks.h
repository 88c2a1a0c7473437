// Causal attention inside documents, block by block with a running softmax (FlashAttention, arXiv 2205.14135 and
// 2307.08691): scores of 96 queries and 64 keys exist at a time, and blocks that no query sees are skipped. Included
// once per instruction set; see kernels.h.

template <typename P, typename Wide, typename Narrow>
struct AttentionTasks {
    using L = Layout<P, Wide>;
    using Store = typename P::Store;
    using Unit = typename P::Unit;
    using Acc = typename P::Acc;
    using Problem = attention::Problem;
    using Heads = attention::Heads;
    // Probabilities as a product reads them: pairs of bf16, or single floats.
    using Weights = typename If<P::kPack == 2, P, Singles<Acc>>::Type;
    using Weight = typename Weights::Store;
    static constexpr int64_t kQueries = attention::kQueries, kKeys = attention::kKeys, kNarrow = attention::kNarrow;
    static_assert(kKeys == kPanel && Narrow::kColumns == kNarrow);

    struct Scratch {
        Unit *keys, *values;          // [key blocks][units of d][64]: columns are keys
        Unit *key_rows, *value_rows;  // [key blocks][panels][units of 64 keys][32]: columns are of d
        Unit *q, *dy;                 // [96][units of d]
        Unit *q_rows, *dy_rows;       // [panels][units of 96 queries][32]
        Acc *scores, *products;       // [96][64]
        Weight *weights, *slopes;     // [96][64]
        Unit* turned;                 // [64][units of 96 queries]
        Unit* block;                  // [units of 96 queries][64], on the way there
        Acc* tile;                    // [rows][32]
        Acc *out, *dk, *dv;           // [96], [S], [S] rows of d, whole panels
        int64_t bytes;
    };

    static Scratch cut(const Problem& p, void* memory) {
        int64_t used = 0;
        const auto take = [&]<typename T>(T*& to, int64_t count) {
            to = reinterpret_cast<T*>(static_cast<char*>(memory) + used);
            used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
        };
        const int64_t d_units = L::units(p.head_dim), d = p.value_panels() * kNarrow;
        const int64_t rows = kQueries + kSlackRows;
        Scratch s{};
        take(s.keys, p.key_blocks() * d_units * kKeys);
        take(s.values, p.key_blocks() * d_units * kKeys);
        take(s.key_rows, p.key_blocks() * L::units(kKeys) * d);
        take(s.value_rows, p.key_blocks() * L::units(kKeys) * d);
        take(s.q, rows * d_units);
        take(s.dy, rows * d_units);
        take(s.q_rows, L::units(kQueries) * d);
        take(s.dy_rows, L::units(kQueries) * d);
        take(s.scores, rows * kKeys);
        take(s.products, rows * kKeys);
        take(s.weights, rows * kKeys);
        take(s.slopes, rows * kKeys);
        take(s.turned, (kKeys + kSlackRows) * L::units(kQueries));
        take(s.block, L::units(kQueries) * kKeys);
        take(s.tile, Narrow::kRows * kNarrow);
        take(s.out, kQueries * d);
        take(s.dk, p.length * d);
        take(s.dv, p.length * d);
        s.bytes = used;
        return s;
    }
    static int64_t scratch_bytes(const Problem& p) { return cut(p, nullptr).bytes; }

    static Store* at(const Heads& m, int64_t batch, int64_t token, int64_t head) {
        return static_cast<Store*>(m.data) + batch * m.batch_stride + token * m.token_stride + head * m.head_stride;
    }

    // ---- operands -------------------------------------------------------------------------------------------------

    // Blocks of keys (or values) whose columns are tokens, for products over d.
    static void pack_tokens(const Problem& p, const Heads& m, int64_t batch, int64_t head, Unit* to) {
        for (int64_t block = 0; block < p.key_blocks(); ++block) {
            const Store* rows[kKeys];
            for (int64_t j = 0; j < kKeys; ++j) {
                const int64_t token = block * kKeys + j;
                rows[j] = token < p.length ? at(m, batch, token, head) : nullptr;
            }
            L::pack_columns(rows, p.head_dim, to + block * L::units(p.head_dim) * kKeys);
        }
    }

    // Rows begin .. of at most `count` tokens whose columns are of d, for products over tokens.
    static void pack_rows(const Problem& p, const Heads& m, int64_t batch, int64_t head, int64_t begin, int64_t count,
                          Unit* to) {
        for (int64_t panel = 0; panel < p.value_panels(); ++panel) {
            const int64_t valid = least(kNarrow, p.head_dim - panel * kNarrow);
            const auto row = [&](int64_t token) -> const Store* {
                return token < least(begin + count, p.length) ? at(m, batch, token, head) + panel * kNarrow : nullptr;
            };
            for (int64_t k = 0; k < L::units(count); ++k) {
                const int64_t token = begin + k * P::kPack;
                L::template pack_row<kNarrow>(row(token), P::kPack == 2 ? row(token + 1) : nullptr, valid, to);
                to += kNarrow;
            }
        }
    }

    static void stage(const Problem& p, const Heads& m, int64_t batch, int64_t head, int64_t begin, int64_t count,
                      Unit* to, const Unit** rows) {
        const int64_t units = L::units(p.head_dim);
        for (int64_t i = 0; i < count; ++i) {
            L::copy_row(at(m, batch, begin + i, head), p.head_dim, to + i * units);
            rows[i] = to + i * units;
        }
    }

    // ---- products ---------------------------------------------------------------------------------------------------

    // out[i][0 .. 64) = rows[i] times one block of tokens, for i in [begin, count).
    static void multiply_tokens(const Problem& p, const Unit* const* rows, int64_t begin, int64_t count,
                                const Unit* block, Acc* out) {
        for (int64_t i = begin; i < count; i += Wide::kRows)
            Wide::multiply(rows + i, least(Wide::kRows, count - i), count - i, L::units(p.head_dim), block,
                           out + i * kKeys);
    }

    // out[i] += rows[i] times the panels of `packed`, for i in [begin, count); rows are k_units long.
    static void add_product(const Problem& p, const Scratch& s, const Unit* const* rows, int64_t begin, int64_t count,
                            int64_t k_units, const Unit* packed, Acc* out) {
        const int64_t d = p.value_panels() * kNarrow;
        for (int64_t panel = 0; panel < p.value_panels(); ++panel) {
            for (int64_t i = begin; i < count; i += Narrow::kRows) {
                const int64_t num_rows = least(Narrow::kRows, count - i);
                Narrow::multiply(rows + i, num_rows, count - i, k_units, packed + panel * k_units * kNarrow, s.tile);
                for (int64_t r = 0; r < num_rows; ++r) {
                    Acc* const to = out + (i + r) * d + panel * kNarrow;
                    const Acc* const from = s.tile + r * kNarrow;
                    for (int64_t j = 0; j < kNarrow; ++j)
                        to[j] += from[j];
                }
            }
        }
    }

    // Weights of a block of scores are rows of 64 in memory; as operands over keys.
    static void weight_rows(const Weight* weights, const Unit** rows) {
        for (int64_t i = 0; i < kQueries; ++i)
            rows[i] = reinterpret_cast<const Unit*>(weights + i * kKeys);
    }
    // And over queries.
    static void turn(const Scratch& s, const Weight* weights, int64_t count, const Unit** rows) {
        const Weight* from[kQueries];
        for (int64_t i = 0; i < kQueries; ++i)
            from[i] = i < count ? weights + i * kKeys : nullptr;
        Layout<Weights, Wide>::transpose(from, kQueries, kKeys, s.block, s.turned);
        for (int64_t j = 0; j < kKeys; ++j)
            rows[j] = s.turned + j * L::units(kQueries);
    }

    // ---- one block of scores
    // ------------------------------------------------------------------------------------------

    // Columns of a block of keys from `key` on that a query sees: [begin, end).
    struct Seen {
        int64_t begin, end;
        Seen(const Problem& p, const int32_t* first, int64_t query, int64_t key)
            : begin(least(most(first[query] - key, 0), kKeys)),
              end(least(query - key + 1, least(kKeys, p.length - key))) {}
        bool none() const { return begin >= end; }
        bool all() const { return begin == 0 && end == kKeys; }
    };

    // The first of a tile's queries that may see a key: those before it are all earlier than the block.
    static int64_t first_seeing(int64_t query, int64_t key, int64_t rows) {
        return key <= query ? 0 : (key - query) / rows * rows;
    }

    static Acc largest(const Acc* score) {
        auto lanes = Lanes<Acc>::load(score);
        for (int64_t j = kLanes; j < kKeys; j += kLanes)
            lanes.keep_larger(Lanes<Acc>::load(score + j));
        return lanes.largest();
    }
    static Lanes<Acc> sum(const Acc* value) {
        auto lanes = Lanes<Acc>::load(value);
        for (int64_t j = kLanes; j < kKeys; j += kLanes)
            lanes.add(Lanes<Acc>::load(value + j));
        return lanes;
    }

    // score = exp(scale * score - shift) where seen, else 0.
    static void exponentiate(Acc scale, Acc shift, const Seen& seen, Acc* score) {
        if (seen.all()) {
            for (int64_t j = 0; j < kKeys; ++j)
                score[j] = exp_clamped(scale * score[j] - shift);
            return;
        }
        const auto begin = static_cast<int32_t>(seen.begin), end = static_cast<int32_t>(seen.end);
        for (int32_t j = 0; j < kKeys; ++j) {
            const Acc value = exp_clamped(scale * score[j] - shift);
            score[j] = j >= begin && j < end ? value : Acc(0);
        }
    }

    static void forget_weights(Weight* weights) {
        for (int64_t j = 0; j < kKeys; ++j)
            weights[j] = Weight{};
    }

    // ---- forward
    // ------------------------------------------------------------------------------------------------------

    struct Softmax {
        Acc largest = Acc(-__builtin_inf());
        Lanes<Acc> sum = {};
    };

    static void forward(const Problem& p, void* scratch, int64_t batch, int64_t key_head) {
        [[maybe_unused]] const typename Wide::Session session;
        const Scratch s = cut(p, scratch);
        pack_tokens(p, p.k, batch, key_head, s.keys);
        for (int64_t block = 0; block < p.key_blocks(); ++block)
            pack_rows(p, p.v, batch, key_head, block * kKeys, kKeys, value_block(p, s.value_rows, block));
        for (int64_t head = key_head * p.group(); head < (key_head + 1) * p.group(); ++head) {
            for (int64_t query = 0; query < p.length; query += kQueries)
                attend(p, s, batch, head, query, least(kQueries, p.length - query));
        }
    }

    static Unit* value_block(const Problem& p, Unit* rows, int64_t block) {
        return rows + block * L::units(kKeys) * p.value_panels() * kNarrow;
    }

    static void attend(const Problem& p, const Scratch& s, int64_t batch, int64_t head, int64_t query, int64_t count) {
        const int32_t* const first = p.first + batch * p.length;
        const int64_t d = p.value_panels() * kNarrow;
        const Unit *q[kQueries], *weights[kQueries];
        Softmax state[kQueries];
        stage(p, p.q, batch, head, query, count, s.q, q);
        weight_rows(s.weights, weights);
        for (int64_t i = 0; i < count * d; ++i)
            s.out[i] = 0;
        for (int64_t block = first[query] / kKeys; block * kKeys < query + count; ++block) {
            const int64_t key = block * kKeys;
            multiply_tokens(p, q, first_seeing(query, key, Wide::kRows), count,
                            s.keys + block * L::units(p.head_dim) * kKeys, s.scores);
            for (int64_t i = 0; i < count; ++i)
                weigh(p, s, Seen(p, first, query + i, key), i, d, state[i]);
            add_product(p, s, weights, first_seeing(query, key, Narrow::kRows), count, L::units(kKeys),
                        value_block(p, s.value_rows, block), s.out);
        }
        for (int64_t i = 0; i < count; ++i) {
            Store* const y = at(p.y, batch, query + i, head);
            const Acc sum = state[i].sum.sum();
            for (int64_t j = 0; j < d; ++j)
                s.out[i * d + j] /= sum;
            store_head(p, s.out + i * d, y);
            static_cast<Acc*>(p.lse)[(batch * p.num_heads + head) * p.length + query + i] =
                state[i].largest + logarithm(sum);
        }
    }

    static float logarithm(float x) { return __builtin_logf(x); }
    static double logarithm(double x) { return __builtin_log(x); }

    // One query's scores of one block become weights; what was summed before is rescaled to the new largest score.
    static void weigh(const Problem& p, const Scratch& s, const Seen& seen, int64_t i, int64_t d, Softmax& state) {
        Weight* const weights = s.weights + i * kKeys;
        if (seen.none()) return forget_weights(weights);
        Acc* const score = s.scores + i * kKeys;
        const auto scale = static_cast<Acc>(p.scale);
        if (!seen.all()) {
            const auto begin = static_cast<int32_t>(seen.begin), end = static_cast<int32_t>(seen.end);
            for (int32_t j = 0; j < kKeys; ++j)
                score[j] = j >= begin && j < end ? score[j] : Acc(-__builtin_inf());
        }
        const Acc block_largest = scale * largest(score);
        const Acc now = block_largest > state.largest ? block_largest : state.largest;
        exponentiate(scale, now, seen, score);
        if (now != state.largest) {
            const Acc shrink = exp_clamped(state.largest - now);
            for (int64_t j = 0; j < d; ++j)
                s.out[i * d + j] *= shrink;
            state.largest = now;
            state.sum.v *= shrink;
        }
        state.sum.add(sum(score));
        store_numbers<kKeys, Wide>(score, weights);
    }

    // ---- backward
    // -----------------------------------------------------------------------------------------------------

    static void backward(const Problem& p, void* scratch, int64_t batch, int64_t key_head) {
        [[maybe_unused]] const typename Wide::Session session;
        const Scratch s = cut(p, scratch);
        const int64_t d = p.value_panels() * kNarrow;
        pack_tokens(p, p.k, batch, key_head, s.keys);
        pack_tokens(p, p.v, batch, key_head, s.values);
        for (int64_t block = 0; block < p.key_blocks(); ++block)
            pack_rows(p, p.k, batch, key_head, block * kKeys, kKeys, value_block(p, s.key_rows, block));
        for (int64_t i = 0; i < p.length * d; ++i) {
            s.dk[i] = 0;
            s.dv[i] = 0;
        }
        for (int64_t head = key_head * p.group(); head < (key_head + 1) * p.group(); ++head) {
            for (int64_t query = 0; query < p.length; query += kQueries)
                attend_backward(p, s, batch, head, query, least(kQueries, p.length - query));
        }
        for (int64_t token = 0; token < p.length; ++token) {
            store_head(p, s.dk + token * d, at(p.dk, batch, token, key_head));
            store_head(p, s.dv + token * d, at(p.dv, batch, token, key_head));
        }
    }

    static void store_head(const Problem& p, const Acc* from, Store* to) {
        for (int64_t j = 0; j < p.head_dim; ++j)
            store_number(from[j], to + j);
    }

    static void attend_backward(const Problem& p, const Scratch& s, int64_t batch, int64_t head, int64_t query,
                                int64_t count) {
        const int32_t* const first = p.first + batch * p.length;
        const int64_t d = p.value_panels() * kNarrow, k_units = L::units(kQueries);
        const Unit *q[kQueries], *dy[kQueries], *slopes[kQueries], *turned[kKeys];
        stage(p, p.q, batch, head, query, count, s.q, q);
        stage(p, p.dy, batch, head, query, count, s.dy, dy);
        pack_rows(p, p.q, batch, head, query, kQueries, s.q_rows);
        pack_rows(p, p.dy, batch, head, query, kQueries, s.dy_rows);
        weight_rows(s.slopes, slopes);
        const Acc* const lse = static_cast<const Acc*>(p.lse) + (batch * p.num_heads + head) * p.length + query;
        Acc delta[kQueries];
        for (int64_t i = 0; i < count; ++i)
            delta[i] = dot(p, at(p.y, batch, query + i, head), at(p.dy, batch, query + i, head));
        for (int64_t i = 0; i < count * d; ++i)
            s.out[i] = 0;
        for (int64_t block = first[query] / kKeys; block * kKeys < query + count; ++block) {
            const int64_t key = block * kKeys, seeing = first_seeing(query, key, Wide::kRows);
            const int64_t offset = block * L::units(p.head_dim) * kKeys, num_keys = least(kKeys, p.length - key);
            multiply_tokens(p, q, seeing, count, s.keys + offset, s.scores);
            multiply_tokens(p, dy, seeing, count, s.values + offset, s.products);
            for (int64_t i = 0; i < count; ++i)
                slope(p, s, Seen(p, first, query + i, key), i, lse[i], delta[i]);
            add_product(p, s, slopes, first_seeing(query, key, Narrow::kRows), count, L::units(kKeys),
                        value_block(p, s.key_rows, block), s.out);
            turn(s, s.weights, count, turned);
            add_product(p, s, turned, 0, num_keys, k_units, s.dy_rows, s.dv + key * d);
            turn(s, s.slopes, count, turned);
            add_product(p, s, turned, 0, num_keys, k_units, s.q_rows, s.dk + key * d);
        }
        for (int64_t i = 0; i < count; ++i)
            store_head(p, s.out + i * d, at(p.dq, batch, query + i, head));
    }

    static Acc dot(const Problem& p, const Store* a, const Store* b) {
        Acc total = 0;
        for (int64_t j = 0; j < p.head_dim; ++j)
            total += load_number(a[j]) * load_number(b[j]);
        return total;
    }

    // One query's scores and products dy v^T of one block become weights and scale * weight * (product - delta).
    static void slope(const Problem& p, const Scratch& s, const Seen& seen, int64_t i, Acc lse, Acc delta) {
        if (seen.none()) {
            forget_weights(s.weights + i * kKeys);
            return forget_weights(s.slopes + i * kKeys);
        }
        Acc* const weight = s.scores + i * kKeys;
        Acc* const product = s.products + i * kKeys;
        const auto scale = static_cast<Acc>(p.scale);
        exponentiate(scale, lse, seen, weight);
        for (int64_t j = 0; j < kKeys; ++j)
            product[j] = weight[j] == 0 ? Acc(0) : scale * weight[j] * (product[j] - delta);
        store_numbers<kKeys, Wide>(weight, s.weights + i * kKeys);
        store_numbers<kKeys, Wide>(product, s.slopes + i * kKeys);
    }
};
