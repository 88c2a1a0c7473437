// The forward tasks of expert_mlp, and what the backward ones share, over a tile product that an instruction set
// provides. Included once per instruction set; see kernels.h. Tile::multiply(a, num_rows, rows_left, k_units, panel, c)
// sets c[i][0 .. 64) to the sum over k of a[i][k]
// * panel[k][0 .. 64) for i < num_rows <= Tile::kRows; a holds rows_left row pointers, panel is [k_units][64] units, c
// is Acc.

template <typename P, typename Tile>
struct Forward : Layout<P, Tile> {
    using Base = Layout<P, Tile>;
    using Base::kPack;
    using typename Base::Acc;
    using typename Base::Scratch;
    using typename Base::Store;
    using typename Base::Unit;
    static constexpr int64_t kRows = Tile::kRows;

    static Acc weight_of(const Problem& p, int64_t pair) { return static_cast<const Acc*>(p.weight)[pair]; }

    // Calls sink(first row, rows) with s.tile for every tile of s.rows, fetching `ahead` meanwhile.
    template <typename Fetched, typename Sink>
    static void for_tiles(const Scratch& s, int64_t count, int64_t k_units, Fetched ahead, const Sink& sink) {
        ahead.spread_over((count + kRows - 1) / kRows);
        for (int64_t i = 0; i < count; i += kRows) {
            ahead.fetch();
            const int64_t num_rows = least(kRows, count - i);
            Tile::multiply(s.rows + i, num_rows, count - i, k_units, s.panel, s.tile);
            sink(i, num_rows);
        }
    }

    static void source_rows(Scratch& s, const Problem& p, const Matrix& m, int64_t begin, int64_t count) {
        for (int64_t i = 0; i < count; ++i)
            s.sources[i] = at<Store>(m, 0, 0, p.row[begin + i]);
    }

    // The first `valid` of 64 sums.
    static void store_some(const Acc* from, int64_t valid, Store* to) {
        if (valid == kPanel) return store_numbers<kPanel, Tile>(from, to);
        for (int64_t j = 0; j < valid; ++j)
            store_number(from[j], to + j);
    }

    // ---- forward --------------------------------------------------------------------------------------------------

    static int64_t row_bytes(int64_t size) { return size * static_cast<int64_t>(sizeof(Store)); }

    // What a column of H belongs to; in the padding there is no such unit.
    struct HiddenUnit {
        int64_t part, unit;
    };
    static HiddenUnit hidden_unit(const Problem& p, int64_t column) {
        const int64_t shift = p.gated() ? 5 : 6;  // a panel has 32 or 64 units: no division
        const int64_t j = column % kPanel;
        return {j >> shift, (column / kPanel << shift) + (j & ((1 << shift) - 1))};
    }

    // A column of H is this row of w_in, or null in the padding.
    static const Store* w_in_row(const Problem& p, int64_t slot, int64_t column) {
        const auto [part, unit] = hidden_unit(p, column);
        return unit < p.hidden ? at<Store>(p.w_in, slot, part, unit) : nullptr;
    }

    static void pack_w_in(const Problem& p, int64_t slot, int64_t panel, Unit* to) {
        const Store* rows[kPanel];
        for (int64_t j = 0; j < kPanel; ++j)
            rows[j] = w_in_row(p, slot, panel * kPanel + j);
        Base::pack_columns(rows, p.width, to);
    }

    static void up(const Problem& p, void* scratch, int64_t group, int64_t begin, int64_t end) {
        [[maybe_unused]] const typename Tile::Session session;
        Scratch s = Base::cut(p, scratch);
        const int64_t slot = p.slot_of(group);
        const int64_t limit = Base::stage_limit(s, p.width, false);
        for (int64_t block = begin; block < end; block += limit) {
            const int64_t count = least(limit, end - block);
            source_rows(s, p, p.x, block, count);
            Base::stage(s, 0, count, p.width, false);
            for (int64_t panel = 0; panel < p.hidden_panels(); ++panel) {
                pack_w_in(p, slot, panel, s.panel);
                Acc bias[kPanel];
                load_bias(p, slot, panel, bias);
                const bool last = panel + 1 == p.hidden_panels();
                const int64_t next_slot = last && group + 1 < p.group_end ? p.slot_of(group + 1) : slot;
                const int64_t next_panel = last ? 0 : panel + 1;
                const Ahead ahead{[&](int64_t j) { return w_in_row(p, next_slot, next_panel * kPanel + j); }, kPanel,
                                  row_bytes(p.width)};
                for_tiles(s, count, Base::units(p.width), ahead, [&](int64_t i, int64_t num_rows) {
                    for (int64_t r = 0; r < num_rows; ++r)
                        finish_hidden(p, block + i + r, panel, bias, s.tile + r * kPanel);
                });
            }
        }
    }

    // One panel's; zeros where there is none.
    static void load_bias(const Problem& p, int64_t slot, int64_t panel, Acc* bias) {
        for (int64_t j = 0; j < kPanel; ++j)
            bias[j] = 0;
        if (p.b_in.data == nullptr) return;
        for (int64_t j = 0; j < kPanel; ++j) {
            const auto [part, unit] = hidden_unit(p, panel * kPanel + j);
            if (unit < p.hidden) bias[j] = load_number(at<Store>(p.b_in, slot, part, 0)[unit]);
        }
    }

    // One pair's columns of one panel: adds the bias, keeps H, activates, weighs. Padding becomes zero.
    static void finish_hidden(const Problem& p, int64_t pair, int64_t panel, const Acc* bias, Acc* h) {
        if (p.b_in.data != nullptr) {
            for (int64_t j = 0; j < kPanel; ++j)
                h[j] += bias[j];
        }
        const int64_t per_panel = p.units_per_panel();
        const int64_t valid = least(per_panel, p.hidden - panel * per_panel);
        for (int64_t j = valid; j < per_panel; ++j) {
            h[j] = 0;
            h[kPanel - per_panel + j] = 0;
        }
        if (p.h.data != nullptr) {
            Store* const kept = at<Store>(p.h, 0, 0, pair) + panel * kPanel;
            store_numbers<kPanel, Tile>(h, kept);
        }
        if (p.a.data == nullptr) return;
        Store* const a = at<Store>(p.a, 0, 0, pair) + panel * per_panel;
        const Acc weight = weight_of(p, pair);
        Acc weighted[kPanel], slope;
        if (p.gated()) {
            constexpr int kCount = kPanel / 2 / kLanes;
            const auto gate = Abreast<Acc, kCount>::of([h](int i) { return Lanes<Acc>::load(h + i * kLanes); });
            const auto up =
                Abreast<Acc, kCount>::of([h](int i) { return Lanes<Acc>::load(h + kPanel / 2 + i * kLanes); });
            (gate * sigmoid(gate) * up * weight).store(weighted);
            return store_numbers<kPanel / 2, Tile>(weighted, a);
        }
        if (p.activation == Activation::kRelu2) {
            for (int64_t j = 0; j < kPanel; ++j)
                weighted[j] = weight * activate(Activation::kRelu2, h[j], &slope);
        } else {
            for (int64_t j = 0; j < kPanel; ++j)
                weighted[j] = weight * activate(Activation::kGelu, h[j], &slope);
        }
        store_numbers<kPanel, Tile>(weighted, a);
    }

    // ---- sums over a row's pairs ------------------------------------------------------------------------------------

    // One task: rows [begin, end) of `out`, 64 columns of them from 64 panel on, as sums over `pairs`, of which `size`
    // numbers count.
    struct RowSums {
        int64_t begin, end, panel;
        const Matrix& pairs;
        int64_t size;
        const Matrix& out;  // without data: the sums outlive the task, in p.dx_sums
    };

    // out[row] = sum over the row's pairs, groups ascending, of pairs[pair] times a packed panel. pack(slot) fills
    // s.panel, ahead(slot) is what it reads, extra(pair, sum) adds what else a pair has. Pairs are found by their rows,
    // so that a task has its rows to itself:
    //
    //     p.row     0 2 5 | 1 2 | 0 5        pairs of groups 0, 1 and 2; rows ascend in each
    //     task of   rows [0, 3): pairs 0, 1    3, 4    5       its rows' sums: 0 of pairs 0 and 5, 1 of 3, 2 of 1 and 4
    //     task of   rows [3, 6): pairs 2      none     6
    template <typename Pack, typename Next, typename Extra>
    static void sum_pairs(const Problem& p, Scratch& s, const RowSums& task, const Pack& pack, const Next& ahead,
                          const Extra& extra) {
        const auto& [begin, end, panel, pairs, size, out] = task;
        const Sums sums = out.data == nullptr ? Sums{p.dx_sums, panel * kPanel} : own_sums(s, begin, end);
        for (int64_t group = p.group_begin; group < p.group_end; ++group) {
            const int32_t* const last = p.row + p.offset[group + 1];
            const int32_t* const first =
                p.rows_ascend ? lower_bound(p.row + p.offset[group], last, begin) : p.row + p.offset[group];
            const int32_t* const stop = p.rows_ascend ? lower_bound(first, last, end) : last;
            if (first == stop) continue;
            pack(p.slot_of(group));
            const int64_t next_slot = p.slot_of(least(group + 1, p.group_end - 1));
            for (const int32_t* next = first; next != stop;)
                next = sum_block(p, s, task, next, stop, sums, ahead(next_slot), extra);
        }
        if (out.data == nullptr) return;
        for (int64_t row = begin; row < end; ++row)
            store_some(sums.of(row), least(kPanel, p.width - panel * kPanel),
                       at<Store>(out, 0, 0, row) + panel * kPanel);
    }

    // Where a task sums: in its scratch, or in sums that outlive it.
    struct Sums {
        Matrix rows;
        int64_t column;
        Acc* of(int64_t row) const { return at<Acc>(rows, 0, 0, row) + column; }
    };
    static Sums own_sums(const Scratch& s, int64_t begin, int64_t end) {
        for (int64_t i = 0; i < (end - begin) * kPanel; ++i)
            s.sums[i] = 0;
        return {{.data = s.sums, .row_stride = kPanel, .first_row = begin}, 0};
    }

    // As many pairs of [next, stop) as fit one block; returns where it stopped.
    template <typename Fetched, typename Extra>
    static const int32_t* sum_block(const Problem& p, Scratch& s, const RowSums& task, const int32_t* next,
                                    const int32_t* stop, const Sums& sums, const Fetched& ahead, const Extra& extra) {
        const int64_t size = task.size;
        const int64_t limit = Base::stage_limit(s, size, p.rows_ascend);
        int64_t count = 0;
        Acc* target[kPairsPerBlock];
        int64_t pair[kPairsPerBlock];
        for (; next != stop && count < limit; ++next) {
            if (*next < task.begin || *next >= task.end) continue;
            pair[count] = next - p.row;
            s.sources[count] = at<Store>(task.pairs, 0, 0, next - p.row);
            target[count++] = sums.of(*next);
        }
        Base::stage(s, 0, count, size, p.rows_ascend);
        fetch_sums(target, 0, least(kRows, count));
        if constexpr (requires { Tile::kUnitsAdded; }) {
            if (p.rows_ascend && Base::units(size) <= Tile::kUnitsAdded) {
                add_tiles(s, count, Base::units(size), ahead, target);
                for (int64_t i = 0; i < count; ++i)
                    extra(pair[i], target[i]);
                return next;
            }
        }
        for_tiles(s, count, Base::units(size), ahead, [&](int64_t i, int64_t num_rows) {
            fetch_sums(target, i + num_rows, least(i + num_rows + kRows, count));
            for (int64_t r = 0; r < num_rows; ++r) {
                const Acc* const from = s.tile + r * kPanel;
                Acc* const to = target[i + r];
                for (int64_t j = 0; j < kPanel; ++j)
                    to[j] += from[j];
                extra(pair[i + r], to);
            }
        });
        return next;
    }

    // The same straight from a tile's registers to the sums, where no two pairs of a block have one row.
    template <typename Fetched>
    static void add_tiles(const Scratch& s, int64_t count, int64_t k_units, Fetched ahead, Acc* const* target) {
        ahead.spread_over((count + kRows - 1) / kRows);
        for (int64_t i = 0; i < count; i += kRows) {
            ahead.fetch();
            const int64_t num_rows = least(kRows, count - i);
            fetch_sums(target, i + num_rows, least(i + num_rows + kRows, count));
            Tile::add_product(s.rows + i, num_rows, count - i, k_units, s.panel, target + i);
        }
    }

    static void fetch_sums(Acc* const* target, int64_t begin, int64_t end) {
        constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(Acc));
        for (int64_t i = begin; i < end; ++i) {
            for (int64_t j = 0; j < kPanel; j += kLine)
                __builtin_prefetch(target[i] + j, 1, 3);
        }
    }

    static const int32_t* lower_bound(const int32_t* first, const int32_t* last, int64_t value) {
        while (first != last) {
            const int32_t* const middle = first + (last - first) / 2;
            if (*middle < value) {
                first = middle + 1;
            } else {
                last = middle;
            }
        }
        return first;
    }

    static void down(const Problem& p, void* scratch, int64_t begin, int64_t end, int64_t panel) {
        [[maybe_unused]] const typename Tile::Session session;
        Scratch s = Base::cut(p, scratch);
        Acc bias[kPanel];
        const int64_t valid = least(kPanel, p.width - panel * kPanel);
        const auto pack = [&](int64_t slot) {
            const Store* rows[kPanel];
            for (int64_t j = 0; j < kPanel; ++j)
                rows[j] = j < valid ? at<Store>(p.w_out, slot, 0, panel * kPanel + j) : nullptr;
            pack_padded(p, rows, s.panel);
            if (p.b_out.data == nullptr) return;
            for (int64_t j = 0; j < kPanel; ++j)
                bias[j] = j < valid ? load_number(at<Store>(p.b_out, slot, 0, 0)[panel * kPanel + j]) : Acc(0);
        };
        const auto add_bias = [&](int64_t pair, Acc* to) {
            if (p.b_out.data == nullptr) return;
            const Acc weight = weight_of(p, pair);
            for (int64_t j = 0; j < kPanel; ++j)
                to[j] += weight * bias[j];
        };
        const auto ahead = [&](int64_t slot) {
            return Ahead{[&p, slot, panel](int64_t j) { return at<Store>(p.w_out, slot, 0, panel * kPanel + j); },
                         valid, row_bytes(p.hidden)};
        };
        sum_pairs(p, s, {begin, end, panel, p.a, p.activated_columns(), p.y}, pack, ahead, add_bias);
    }

    // Columns of F numbers, with zeros up to a's padded width.
    static void pack_padded(const Problem& p, const Store* const* rows, Unit* panel) {
        Base::pack_columns(rows, p.hidden, panel);
        for (int64_t i = Base::units(p.hidden) * kPanel; i < Base::units(p.activated_columns()) * kPanel; ++i)
            panel[i] = 0;
    }
};
