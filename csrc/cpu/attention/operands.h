// What attention's tasks multiply: one segment's tokens of a head, packed for tiles, and the products of them. Included
// once per instruction set; see kernels.h.

template <typename P, typename Wide, typename Narrow, typename Rows>
struct AttentionOperands {
    using L = Layout<P, Wide>;
    using Store = typename P::Store;
    using Unit = typename P::Unit;
    using Acc = typename P::Acc;
    using Weight = typename Rows::Weight;
    using Problem = attention::Problem;
    using Segment = attention::Segment;
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

    // One head of a segment's queries or keys, or of sums for them.
    template <typename T>
    struct TokensOf {
        T* data;
        int64_t stride;
        T* operator[](int64_t token) const { return data + token * stride; }
    };
    using Tokens = TokensOf<Store>;
    template <typename T>
    static TokensOf<T> tokens_of(const Heads& m, int64_t begin, int64_t head) {
        return {static_cast<T*>(m.data) + begin * m.token_stride + head * m.head_stride, m.token_stride};
    }
    static Tokens queries_of(const Heads& m, const Segment& of, int64_t head) {
        return tokens_of<Store>(m, of.query, head);
    }
    static Tokens keys_of(const Heads& m, const Segment& of, int64_t head) { return tokens_of<Store>(m, of.key, head); }
    static TokensOf<Acc> query_sums_of(const Heads& m, const Segment& of, int64_t head) {
        return tokens_of<Acc>(m, of.query, head);
    }
    static TokensOf<Acc> key_sums_of(const Heads& m, const Segment& of, int64_t head) {
        return tokens_of<Acc>(m, of.key, head);
    }
    static Acc* lse_of(const Problem& p, const Segment& of, int64_t head) {
        return static_cast<Acc*>(p.lse) + head * p.length + of.query;
    }

    // ---- operands -------------------------------------------------------------------------------------------------

    // Blocks of keys (or values) whose columns are tokens, for products over d.
    static void pack_tokens(const Problem& p, const Segment& of, const Tokens& tokens, Unit* to) {
        for (int64_t block = 0; block < of.num_blocks(); ++block) {
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

    static Unit* value_block(const Problem& p, Unit* rows, int64_t block) {
        return rows + block * L::units(kKeys) * whole_panels(p);
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
};
