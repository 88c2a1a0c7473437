// A thread's scratch, and how operands get into the order that a tile product reads. Included once per instruction set;
// see kernels.h.

template <typename T>
inline T* at(const Matrix& m, int64_t slot, int64_t part, int64_t row) {
    return static_cast<T*>(m.data) + slot * m.slot_stride + part * m.part_stride + (row - m.first_row) * m.row_stride;
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }

// Bytes of rows copied at a time, where a tile product cannot read them in place: what stays in a level 2 cache.
constexpr int64_t kStagedBytes = 1 << 20;

// What will be read after the products at hand: `bytes` of each of `num_rows` rows, fetched a little per tile.
template <typename Row>
struct Ahead {
    Row row;
    int64_t num_rows, bytes, per_tile = 0, next_row = 0, next_byte = 0;
    const char* from = nullptr;

    void spread_over(int64_t tiles) {
        const int64_t lines = num_rows * ((bytes + 63) / 64);
        per_tile = tiles == 0 ? 0 : (lines + tiles - 1) / tiles;
    }
    void fetch() {
        for (int64_t i = 0; i < per_tile && next_row < num_rows; ++i) {
            if (next_byte == 0) from = reinterpret_cast<const char*>(row(next_row));
            if (from != nullptr) __builtin_prefetch(from + next_byte, 0, 2);  // padding has no rows
            next_byte += 64;
            if (next_byte >= bytes) {
                next_byte = 0;
                ++next_row;
            }
        }
    }
};
template <typename Row>
Ahead(Row, int64_t, int64_t) -> Ahead<Row>;

template <typename P, typename Tile>
struct Layout {
    using Store = typename P::Store;
    using Unit = typename P::Unit;
    using Acc = typename P::Acc;
    static constexpr int64_t kPack = P::kPack;

    // Units of a product over `size` stored numbers.
    static int64_t units(int64_t size) { return round_up((size + kPack - 1) / kPack, Tile::kUnitMultiple); }
    static bool whole_units(int64_t size) { return P::kStoreIsUnit && size == units(size) * kPack; }

    struct Scratch {
        Unit* panel;            // [units][64], one packed panel
        Acc* tile;              // [kRows][64], one product
        const Unit** rows;      // of one block of pairs
        const Store** sources;  // likewise, as stored
        Unit* staged;           // copies of rows
        int64_t staged_rows;    // as many as fit
        Acc* sums;              // [rows of a task][64]
        Unit* transposed;       // [columns][units of a block of pairs]
        Acc* block_sums;        // [columns][columns of a task], where a slot has several blocks of pairs
        double* bias_sums;      // [columns]
        int64_t bytes;
    };

    static Scratch cut(const Problem& p, void* memory) {
        const int64_t longest = most(units(p.width), units(p.hidden_columns()));
        const int64_t columns = most(p.hidden_columns(), round_up(p.width, kPanel));
        const int64_t task_columns = least(columns, kColumnsPerTask);
        const auto size = [](int64_t count, uint64_t elem_bytes) { return count * static_cast<int64_t>(elem_bytes); };
        int64_t used = 0;
        const auto take = [&](int64_t bytes) {
            auto* const taken = static_cast<char*>(memory) + used;
            used += round_up(bytes, 64);
            return static_cast<void*>(taken);
        };
        Scratch s{};
        s.staged_rows = least(most(kStagedBytes / size(longest, sizeof(Unit)) / Tile::kRows, 1) * Tile::kRows,
                              round_up(kPairsPerBlock, Tile::kRows));
        s.panel = static_cast<Unit*>(take(size(most(longest, units(kPairsPerBlock)) * kPanel, sizeof(Unit))));
        s.tile = static_cast<Acc*>(take(size(Tile::kRows * kPanel, sizeof(Acc))));
        s.rows = static_cast<const Unit**>(take(size(round_up(columns, kPairsPerBlock), sizeof(Unit*))));
        s.sources = static_cast<const Store**>(take(size(kPairsPerBlock, sizeof(Store*))));
        const bool in_place = whole_units(p.width) && !Tile::kEvenRows;  // rows of pairs are whole units in any case
        s.staged = static_cast<Unit*>(take(in_place ? 0 : size(s.staged_rows * longest, sizeof(Unit))));
        s.sums = static_cast<Acc*>(take(size(kRowsPerTask * kPanel, sizeof(Acc))));
        s.transposed = static_cast<Unit*>(take(size((columns + kSlackRows) * units(kPairsPerBlock), sizeof(Unit))));
        const bool one_block = p.most_pairs <= kPairsPerBlock;
        s.block_sums = static_cast<Acc*>(take(one_block ? 0 : size(columns * task_columns, sizeof(Acc))));
        s.bias_sums = static_cast<double*>(take(size(columns, sizeof(double))));
        s.bytes = used;
        return s;
    }

    static int64_t scratch_bytes(const Problem& p) { return cut(p, nullptr).bytes; }

    static Unit unit_of(const Store* row, int64_t k, int64_t size) {
        if constexpr (kPack == 2) {
            const uint32_t low = row[2 * k].bits;
            const uint32_t high = 2 * k + 1 < size ? row[2 * k + 1].bits : 0;
            return low | (high << 16);
        } else {
            return load_number(row[k]);
        }
    }

    // Copies `size` stored numbers as units, zeros behind.
    static void copy_row(const Store* row, int64_t size, Unit* to) {
        const int64_t whole = size / kPack;
        if constexpr (P::kStoreIsUnit) {
            __builtin_memcpy(to, row, static_cast<uint64_t>(whole) * sizeof(Unit));
        } else {
            for (int64_t k = 0; k < whole; ++k)
                to[k] = unit_of(row, k, size);
        }
        int64_t k = whole;
        if (whole * kPack < size) to[k++] = unit_of(row, whole, size);
        for (; k < units(size); ++k)
            to[k] = 0;
    }

    // Makes rows [begin, begin + count) of s.sources readable by a tile product as s.rows[0 .. count). In place where
    // possible; `evenly` says that they are evenly apart in memory, with slack behind.
    static void stage(Scratch& s, int64_t begin, int64_t count, int64_t size, bool evenly) {
        const int64_t k = units(size);
        if (whole_units(size) && (evenly || !Tile::kEvenRows)) {
            for (int64_t i = 0; i < count; ++i)
                s.rows[i] = reinterpret_cast<const Unit*>(s.sources[begin + i]);
            return;
        }
        for (int64_t i = 0; i < count; ++i) {
            copy_row(s.sources[begin + i], size, s.staged + i * k);
            s.rows[i] = s.staged + i * k;
        }
    }
    // Rows that can be staged at once.
    static int64_t stage_limit(const Scratch& s, int64_t size, bool evenly) {
        return whole_units(size) && (evenly || !Tile::kEvenRows) ? kPairsPerBlock : s.staged_rows;
    }

    // panel[k][j] = unit k of row j; rows that are null are zero.
    static void pack_columns(const Store* const* rows, int64_t size, Unit* panel) {
        const int64_t k_units = units(size);
        for (int64_t j0 = 0; j0 < kPanel; j0 += 16) {
            int64_t k = 0;
            if constexpr (P::kStoreIsUnit && Tile::kTransposes) {
                bool present = true;
                for (int64_t j = 0; j < 16; ++j)
                    present &= rows[j0 + j] != nullptr;
                for (; present && (k + 16) * kPack <= size; k += 16)
                    Tile::transpose_rows(rows + j0, k * kPack, panel + k * kPanel + j0, kPanel);
            }
            for (int64_t j = j0; j < j0 + 16; ++j) {
                for (int64_t i = k; i < k_units; ++i)
                    panel[i * kPanel + j] =
                        rows[j] != nullptr && i * kPack < size ? unit_of(rows[j], i, size) : Unit(0);
            }
        }
    }

    // Row k of a panel: the units of one row (or of a pair of rows) in 64 (or fewer) columns, of which `valid` are
    // there. Null rows are zero.
    template <int64_t kColumns = kPanel>
    static void pack_row(const Store* low, const Store* high, int64_t valid, Unit* to) {
        if (valid == kColumns && low != nullptr && (kPack == 1 || high != nullptr)) {
            return pack_whole_row<kColumns>(low, high, to);
        }
        for (int64_t j = 0; j < kColumns; ++j) {
            Store pair[2] = {};
            if (low != nullptr && j < valid) pair[0] = low[j];
            if (high != nullptr && j < valid) pair[1] = high[j];
            to[j] = unit_of(pair, 0, kPack);
        }
    }
    template <int64_t kColumns>
    static void pack_whole_row(const Store* low, [[maybe_unused]] const Store* high, Unit* to) {
        for (int64_t j = 0; j < kColumns; ++j) {
            if constexpr (kPack == 2) {
                to[j] = static_cast<uint32_t>(low[j].bits) | (static_cast<uint32_t>(high[j].bits) << 16);
            } else {
                to[j] = load_number(low[j]);
            }
        }
    }

    // panel[k][j] of the transposed problem: rows are what is summed over, columns [column, column + 64) of `size`.
    static void pack_rows(const Store* const* rows, int64_t num_rows, int64_t column, int64_t size, Unit* panel) {
        const int64_t valid = least(kPanel, size - column);
        const auto row = [&](int64_t i) { return i < num_rows && rows[i] != nullptr ? rows[i] + column : nullptr; };
        for (int64_t k = 0; k < units(num_rows); ++k)
            pack_row(row(k * kPack), kPack == 2 ? row(k * kPack + 1) : nullptr, valid, panel + k * kPanel);
    }

    // transposed[j][k] = the unit of rows k (a pair of rows) in column j < size; zeros to whole units.
    [[gnu::noinline, gnu::noclone]] static void transpose(const Store* const* rows, int64_t num_rows, int64_t size,
                                                          Unit* block, Unit* transposed) {
        const int64_t k_units = units(num_rows);
        for (int64_t column = 0; column < size; column += kPanel) {
            pack_rows(rows, num_rows, column, size, block);
            const int64_t valid = least(kPanel, size - column);
            Unit* const to = transposed + column * k_units;
            int64_t k = 0;
            if constexpr (Tile::kTransposes && sizeof(Unit) == 4) {
                for (; valid % 16 == 0 && k + 16 <= k_units; k += 16) {
                    for (int64_t j = 0; j < valid; j += 16)
                        Tile::transpose_block(block + k * kPanel + j, kPanel, to + j * k_units + k, k_units);
                }
            }
            for (; k < k_units; ++k) {
                for (int64_t j = 0; j < kPanel; ++j) {
                    if (j < valid) to[j * k_units + k] = block[k * kPanel + j];
                }
            }
        }
    }
};
