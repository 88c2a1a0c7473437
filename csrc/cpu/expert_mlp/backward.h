// The backward tasks of expert_mlp. Included once per instruction set; see kernels.h.
//
// SonicMoE's algorithm (arXiv 2512.14080): only x and H are kept from the forward pass. The gradient of a routing
// weight is <dA', A> with dA' = dO W_out and A recomputed from H, so that no expert's output is stored.

template <typename P, typename Tile>
struct Tasks : Forward<P, Tile> {
    using Base = Forward<P, Tile>;
    using Base::for_tiles;
    using Base::kPack;
    using Base::row_bytes;
    using Base::source_rows;
    using Base::store_some;
    using Base::sum_pairs;
    using Base::w_in_row;
    using Base::weight_of;
    using typename Base::Acc;
    using typename Base::Scratch;
    using typename Base::Store;
    using typename Base::Unit;

    static void input_grad(const Problem& p, void* scratch, int64_t begin, int64_t end, int64_t panel) {
        [[maybe_unused]] const typename Tile::Session session;
        Scratch s = Base::cut(p, scratch);
        const auto row = [&p](int64_t slot, int64_t column) { return w_in_row(p, slot, column); };
        const auto pack = [&](int64_t slot) {
            const Store* rows[kPanel];
            for (int64_t column = 0; column < p.hidden_columns(); column += kPanel) {
                for (int64_t j = 0; j < kPanel; ++j)
                    rows[j] = row(slot, column + j);
                Base::pack_rows(rows, kPanel, panel * kPanel, p.width, s.panel + column / kPack * kPanel);
            }
        };
        const auto ahead = [&](int64_t slot) {
            const auto piece = [row, slot, panel](int64_t column) {
                const Store* const found = row(slot, column);
                return found == nullptr ? found : found + panel * kPanel;
            };
            return Ahead{piece, p.hidden_columns(), row_bytes(kPanel)};
        };
        sum_pairs(p, s, {begin, end, panel, p.dh, p.hidden_columns(), p.dx}, pack, ahead, [](int64_t, Acc*) {});
    }

    // ---- gradients of H and of the routing weights ------------------------------------------------------------------

    static void hidden_grad(const Problem& p, void* scratch, int64_t group, int64_t begin, int64_t end) {
        [[maybe_unused]] const typename Tile::Session session;
        Scratch s = Base::cut(p, scratch);
        const int64_t slot = p.slot_of(group);
        const int64_t limit = Base::stage_limit(s, p.width, false);
        for (int64_t block = begin; block < end; block += limit) {
            const int64_t count = least(limit, end - block);
            source_rows(s, p, p.dy, block, count);
            Base::stage(s, 0, count, p.width, false);
            Acc* const dweight = static_cast<Acc*>(p.dweight) + block;
            for (int64_t i = 0; i < count; ++i)
                dweight[i] = p.b_out.data == nullptr ? Acc(0) : bias_product(p, s.sources[i], slot);
            for (int64_t column = 0; column < p.activated_columns(); column += kPanel) {
                pack_w_out_columns(p, slot, column, s.panel);
                const bool last = column + kPanel >= p.activated_columns();
                const int64_t next_slot = last && group + 1 < p.group_end ? p.slot_of(group + 1) : slot;
                const int64_t next_column = last ? 0 : column + kPanel;
                const Ahead ahead{[&](int64_t d) { return at<Store>(p.w_out, next_slot, 0, d) + next_column; }, p.width,
                                  row_bytes(kPanel)};
                for_tiles(s, count, Base::units(p.width), ahead, [&](int64_t i, int64_t num_rows) {
                    for (int64_t r = 0; r < num_rows; ++r)
                        dweight[i + r] += finish_grad(p, block + i + r, column, s.tile + r * kPanel);
                });
            }
        }
    }

    static void pack_w_out_columns(const Problem& p, int64_t slot, int64_t column, Unit* panel) {
        const int64_t valid = least(kPanel, p.hidden - column);
        const auto row = [&](int64_t d) { return d < p.width ? at<Store>(p.w_out, slot, 0, d) + column : nullptr; };
        for (int64_t k = 0; k < Base::units(p.width); ++k)
            Base::pack_row(row(k * kPack), kPack == 2 ? row(k * kPack + 1) : nullptr, valid, panel + k * kPanel);
    }

    static Acc bias_product(const Problem& p, const Store* dy, int64_t slot) {
        const Store* const bias = at<Store>(p.b_out, slot, 0, 0);
        constexpr int64_t kStep = 4 * kLanes, kBlock = 16 * kStep;
        double total = 0;
        int64_t d = 0;
        while (d + kStep <= p.width) {
            const int64_t end = least(d + kBlock, p.width / kStep * kStep);
            Abreast<Acc, 4> sums = {};
            for (; d < end; d += kStep) {
                const auto at_lanes = [d](const Store* from) {
                    return Abreast<Acc, 4>::of([&](int i) { return Lanes<Acc>::load_stored(from + d + i * kLanes); });
                };
                sums = sums + at_lanes(dy) * at_lanes(bias);
            }
            total += sums.sum();
        }
        for (; d < p.width; ++d)
            total += double(load_number(dy[d])) * double(load_number(bias[d]));
        return Acc(total);
    }

    // One pair's 64 columns of dA' from `column` on: stores dH and weight * A, returns their part of <dA', A>.
    static Acc finish_grad(const Problem& p, int64_t pair, int64_t column, const Acc* da) {
        const Acc weight = weight_of(p, pair);
        const Store* const h = at<Store>(p.h, 0, 0, pair);
        Store* const dh = at<Store>(p.dh, 0, 0, pair);
        Store* const a = at<Store>(p.a, 0, 0, pair) + column;
        if (!p.gated()) return ungated_grad(p.activation, weight, h + column, dh + column, a, da);
        // Two panels of H have the gates and ups of 64 columns of a; the last one may be alone.
        constexpr int64_t kHalf = kPanel / 2;
        if (column + kHalf < p.activated_columns())
            return gated_grad<2>(weight, h + 2 * column, dh + 2 * column, a, da);
        return gated_grad<1>(weight, h + 2 * column, dh + 2 * column, a, da);
    }

    static Acc dot(const Acc* a, const Acc* b, int64_t size) {
        Lanes<Acc> sum = {};
        for (int64_t j = 0; j < size; j += kLanes)
            sum.v += Lanes<Acc>::load(a + j).v * Lanes<Acc>::load(b + j).v;
        return sum.sum();
    }

    template <int kHalves>
    static Acc gated_grad(Acc weight, const Store* h, Store* dh, Store* a, const Acc* da) {
        constexpr int64_t kHalf = kPanel / 2, kPerHalf = kHalf / kLanes;
        using Columns = Abreast<Acc, kHalves * kPerHalf>;
        const auto h_at = [h](int i) { return h + i / kPerHalf * kPanel + i % kPerHalf * kLanes; };
        const auto gate = Columns::of([&](int i) { return Lanes<Acc>::load_stored(h_at(i)); });
        const auto up = Columns::of([&](int i) { return Lanes<Acc>::load_stored(h_at(i) + kHalf); });
        const auto d = Columns::of([da](int i) { return Lanes<Acc>::load(da + i * kLanes); });
        const auto s = sigmoid(gate);
        const auto silu = gate * s, activated = silu * up, weighted = d * weight;
        Acc dgate[kHalves * kHalf], dup[kHalves * kHalf], weighted_a[kHalves * kHalf];
        (weighted * up * (silu * (s * Acc(-1) + Acc(1)) + s)).store(dgate);
        (weighted * silu).store(dup);
        (activated * weight).store(weighted_a);
#pragma GCC unroll 2
        for (int64_t i = 0; i < kHalves; ++i) {
            store_numbers<kHalf, Tile>(dgate + i * kHalf, dh + i * kPanel);
            store_numbers<kHalf, Tile>(dup + i * kHalf, dh + i * kPanel + kHalf);
        }
        store_numbers<kHalves * kHalf, Tile>(weighted_a, a);
        return (d * activated).sum();
    }

    static Acc ungated_grad(Activation activation, Acc weight, const Store* h, Store* dh, Store* a, const Acc* da) {
        Acc slope[kPanel], activated[kPanel];
        if (activation == Activation::kRelu2) {
            for (int64_t j = 0; j < kPanel; ++j)
                activated[j] = activate(Activation::kRelu2, Acc(load_number(h[j])), slope + j);
        } else {
            for (int64_t j = 0; j < kPanel; ++j)
                activated[j] = activate(Activation::kGelu, Acc(load_number(h[j])), slope + j);
        }
        const Acc product = dot(da, activated, kPanel);
        for (int64_t j = 0; j < kPanel; ++j) {
            slope[j] *= weight * da[j];
            activated[j] *= weight;
        }
        store_numbers<kPanel, Tile>(slope, dh);
        store_numbers<kPanel, Tile>(activated, a);
        return product;
    }

    // ---- gradients of the weights -----------------------------------------------------------------------------------

    // All pairs of a slot, in blocks: calls use(first pair of the block's segment list) through s.sources.
    struct PairCursor {
        const Problem& p;
        int64_t slot, next_group, pair, stop;
        PairCursor(const Problem& problem, int64_t of_slot)
            : p(problem), slot(of_slot), next_group(problem.slot_offset[of_slot]), pair(0), stop(0) {}
        // The next pair, or -1.
        int64_t next() {
            while (pair == stop) {
                if (next_group == p.slot_offset[slot + 1]) return -1;
                const int32_t group = p.group_of_slot[next_group++];
                pair = p.offset[group];
                stop = p.offset[group + 1];
            }
            return pair++;
        }
    };

    static int64_t pairs_of(const Problem& p, int64_t slot) {
        int64_t sum = 0;
        for (int64_t i = p.slot_offset[slot]; i < p.slot_offset[slot + 1]; ++i)
            sum += p.offset[p.group_of_slot[i] + 1] - p.offset[p.group_of_slot[i]];
        return sum;
    }

    // One task: columns [begin, end) of all num_m rows of a slot's gradient.
    struct SlotGrad {
        int64_t slot, num_m, begin, end;
    };

    // out(m)[column] = sum over the slot's pairs of left(pair)[m] * right(pair)[column]. left and right give a pair's
    // stored row, out a row of the gradient or null.
    template <typename Left, typename Right, typename Out>
    static void outer(const Problem& p, Scratch& s, const SlotGrad& task, const Left& left, const Right& right,
                      const Out& out) {
        const auto [slot, num_m, begin, end] = task;
        const int64_t num_pairs = pairs_of(p, slot);
        const int64_t blocks = most((num_pairs + kPairsPerBlock - 1) / kPairsPerBlock, 1);
        const int64_t per_block = (num_pairs + blocks - 1) / blocks;
        const int64_t task_columns = round_up(end - begin, kPanel);
        PairCursor cursor(p, slot);
        const Store* right_row[kPairsPerBlock];
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t count = least(per_block, num_pairs - block * per_block);
            for (int64_t i = 0; i < count; ++i) {
                const int64_t pair = cursor.next();
                s.sources[i] = left(pair);
                right_row[i] = right(pair);
            }
            Base::transpose(s.sources, count, num_m, s.panel, s.transposed);
            const int64_t k_units = Base::units(count);
            for (int64_t m = 0; m < num_m; ++m)
                s.rows[m] = s.transposed + m * k_units;
            for (int64_t column = begin; column < end; column += kPanel) {
                Base::pack_rows(right_row, count, column, end, s.panel);
                const Ahead ahead{[&](int64_t i) { return right_row[i] + least(column + kPanel, end - 1); }, count,
                                  row_bytes(kPanel)};
                for_tiles(s, num_m, k_units, ahead, [&](int64_t m, int64_t num_rows) {
                    Acc* const sums = s.block_sums + m * task_columns + (column - begin);
                    store_block(s.tile, num_rows, block, blocks, sums, task_columns);
                    const int64_t valid = least(kPanel, end - column);
                    const Acc* const from = blocks == 1 ? s.tile : sums;
                    const int64_t stride = blocks == 1 ? kPanel : task_columns;
                    for (int64_t r = 0; block == blocks - 1 && r < num_rows; ++r)
                        store_row(from + r * stride, valid, out(m + r), column);
                });
            }
        }
    }

    static void store_block(const Acc* tile, int64_t num_rows, int64_t block, int64_t blocks, Acc* sums,
                            int64_t stride) {
        if (blocks == 1) return;
        for (int64_t r = 0; r < num_rows; ++r) {
            for (int64_t j = 0; j < kPanel; ++j)
                sums[r * stride + j] = block == 0 ? tile[r * kPanel + j] : sums[r * stride + j] + tile[r * kPanel + j];
        }
    }

    static void store_row(const Acc* from, int64_t valid, Store* to, int64_t column) {
        if (to != nullptr) store_some(from, valid, to + column);
    }

    static void w_in_grad(const Problem& p, void* scratch, int64_t slot, int64_t begin, int64_t end) {
        [[maybe_unused]] const typename Tile::Session session;
        Scratch s = Base::cut(p, scratch);
        outer(
            p, s, {slot, p.hidden_columns(), begin, end},
            [&](int64_t pair) { return at<const Store>(p.dh, 0, 0, pair); },
            [&](int64_t pair) { return at<const Store>(p.x, 0, 0, p.row[pair]); },
            [&](int64_t m) {
                const auto [part, unit] = Base::hidden_unit(p, m);
                return unit < p.hidden ? at<Store>(p.dw_in, slot, part, unit) : nullptr;
            });
        if (begin == 0 && p.db_in.data != nullptr) b_in_grad(p, s, slot);
    }

    static void w_out_grad(const Problem& p, void* scratch, int64_t slot, int64_t begin, int64_t end) {
        [[maybe_unused]] const typename Tile::Session session;
        Scratch s = Base::cut(p, scratch);
        outer(
            p, s, {slot, p.width, begin, end}, [&](int64_t pair) { return at<const Store>(p.dy, 0, 0, p.row[pair]); },
            [&](int64_t pair) { return at<const Store>(p.a, 0, 0, pair); },
            [&](int64_t m) { return at<Store>(p.dw_out, slot, 0, m); });
        if (begin == 0 && p.db_out.data != nullptr) b_out_grad(p, s, slot);
    }

    // ---- gradients of the biases ------------------------------------------------------------------------------------

    // Pairs whose sum is formed in Acc. These sums are added up in fp64: one long sum in fp32 would lose what many
    // pairs have to add. Blocks begin where the slot's list says, so that no cut of the work shows in the result.
    static constexpr int64_t kPairsPerSum = 64;

    // total[j] = sum over the slot's pairs of weight(pair) * row(pair)[j], for all of `columns`.
    template <typename Row, typename Weight>
    static void sum_columns(const Problem& p, int64_t slot, int64_t columns, const Row& row, const Weight& weight,
                            double* total) {
        for (int64_t j = 0; j < columns; ++j)
            total[j] = 0;
        PairCursor cursor(p, slot);
        const Store* rows[kPairsPerSum];
        Acc weights[kPairsPerSum];
        for (int64_t count = kPairsPerSum; count == kPairsPerSum;) {
            count = 0;
            for (int64_t pair = 0; count < kPairsPerSum && (pair = cursor.next()) >= 0; ++count) {
                rows[count] = row(pair);
                weights[count] = weight(pair);
            }
            int64_t column = 0;
            for (; column + kPanel <= columns; column += kPanel)
                add_panel(rows, weights, count, column, total + column);
            for (; column < columns; ++column) {
                Acc sum = 0;
                for (int64_t i = 0; i < count; ++i)
                    sum += weights[i] * load_number(rows[i][column]);
                total[column] += sum;
            }
        }
    }

    static void add_panel(const Store* const* rows, const Acc* weights, int64_t count, int64_t column, double* total) {
        using Columns = Abreast<Acc, kPanel / kLanes>;
        Columns sums = {};
        for (int64_t i = 0; i < count; ++i) {
            const Store* const from = rows[i] + column;
            sums = sums + Columns::of([&](int j) { return Lanes<Acc>::load_stored(from + j * kLanes); }) * weights[i];
        }
        Acc sum[kPanel];
        sums.store(sum);
        for (int64_t j = 0; j < kPanel; ++j)
            total[j] += sum[j];
    }

    static void b_in_grad(const Problem& p, Scratch& s, int64_t slot) {
        const int64_t columns = p.hidden_columns();
        const auto dh = [&p](int64_t pair) { return at<Store>(p.dh, 0, 0, pair); };
        sum_columns(p, slot, columns, dh, [](int64_t) { return Acc(1); }, s.bias_sums);
        for (int64_t j = 0; j < columns; ++j) {
            const auto [part, unit] = Base::hidden_unit(p, j);
            if (unit < p.hidden) store_number(Acc(s.bias_sums[j]), at<Store>(p.db_in, slot, part, 0) + unit);
        }
    }

    static void b_out_grad(const Problem& p, Scratch& s, int64_t slot) {
        const auto dy = [&p](int64_t pair) { return at<Store>(p.dy, 0, 0, p.row[pair]); };
        sum_columns(p, slot, p.width, dy, [&p](int64_t pair) { return weight_of(p, pair); }, s.bias_sums);
        for (int64_t d = 0; d < p.width; ++d)
            store_number(Acc(s.bias_sums[d]), at<Store>(p.db_out, slot, 0, 0) + d);
    }
};
