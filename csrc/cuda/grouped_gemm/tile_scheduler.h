// Which output tile a block computes next. Runs on the device and on the host.
#pragma once

#include <cstdint>

#include "cuda/ptx/launch.h"

namespace moetrain::gemm {

__host__ __device__ constexpr int ceil_div(int numerator, int denominator) {
    return (numerator + denominator - 1) / denominator;
}

struct Tile {
    int group_idx;
    int row_begin;  // first row of the tile in the concatenation of all groups
    int row_end;    // end of the group, not of the tile: rows from here on belong to others
    int n_tile_idx;
};

// Deals tiles first_tile, first_tile + stride, ... in the order (group, n tile, m tile), m fastest, so that blocks that
// run together share a tile of B. Every role of a block walks its own copy and sees the same tiles.
template <int kTileM>
class TileScheduler {
 public:
    // group_offsets [num_groups + 1], ascending: group g has rows group_offsets[g] to group_offsets[g + 1].
    __host__ __device__ TileScheduler(const int32_t* group_offsets, int num_groups, int num_n_tiles, int first_tile,
                                      int stride)
        : group_offsets_(group_offsets),
          num_groups_(num_groups),
          num_n_tiles_(num_n_tiles),
          tile_idx_(first_tile),
          stride_(stride) {}

    // Returns false when no tile is left.
    __host__ __device__ bool next(Tile& tile) {
        for (; group_idx_ < num_groups_; ++group_idx_) {
            const int row_begin = group_offsets_[group_idx_];
            const int row_end = group_offsets_[group_idx_ + 1];
            const int num_m_tiles = ceil_div(row_end - row_begin, kTileM);
            const int idx_in_group = tile_idx_ - group_first_tile_;
            if (idx_in_group < num_m_tiles * num_n_tiles_) {
                tile = {group_idx_, row_begin + (idx_in_group % num_m_tiles) * kTileM, row_end,
                        idx_in_group / num_m_tiles};
                tile_idx_ += stride_;
                return true;
            }
            group_first_tile_ += num_m_tiles * num_n_tiles_;
        }
        return false;
    }

 private:
    const int32_t* group_offsets_;
    int num_groups_;
    int num_n_tiles_;
    int tile_idx_;
    int stride_;
    int group_idx_ = 0;
    int group_first_tile_ = 0;
};

// A tile of one slot's matrix.
struct SlotTile {
    int slot;
    int m_tile_idx;
    int n_tile_idx;
};

// Deals tiles first_tile, first_tile + stride, ... in the order (slot, n tile, m tile), m fastest.
class SlotTileScheduler {
 public:
    __host__ __device__ SlotTileScheduler(int num_slots, int num_m_tiles, int num_n_tiles, int first_tile, int stride)
        : num_m_tiles_(num_m_tiles),
          num_n_tiles_(num_n_tiles),
          num_tiles_(static_cast<int64_t>(num_slots) * num_m_tiles * num_n_tiles),
          tile_idx_(first_tile),
          stride_(stride) {}

    __host__ __device__ bool next(SlotTile& tile) {
        if (tile_idx_ >= num_tiles_) return false;
        const int64_t column_idx = tile_idx_ / num_m_tiles_;  // a column of tiles
        tile = {static_cast<int>(column_idx / num_n_tiles_), static_cast<int>(tile_idx_ % num_m_tiles_),
                static_cast<int>(column_idx % num_n_tiles_)};
        tile_idx_ += stride_;
        return true;
    }

 private:
    int num_m_tiles_;
    int num_n_tiles_;
    int64_t num_tiles_;
    int64_t tile_idx_;
    int stride_;
};

// Up to kRows rows of one group.
struct RowStep {
    int row_begin;
    int row_end;  // of the group
};

// The rows of one slot's groups, in steps. slot_offsets and slot_groups list each slot's groups; without them slot s
// has group s.
template <int kRows>
class SlotRowWalk {
 public:
    SlotRowWalk() = default;  // of no rows
    __host__ __device__ SlotRowWalk(const int32_t* group_offsets, const int32_t* slot_offsets,
                                    const int32_t* slot_groups, int slot)
        : group_offsets_(group_offsets),
          slot_groups_(slot_groups),
          next_(slot_offsets == nullptr ? slot : slot_offsets[slot]),
          end_(slot_offsets == nullptr ? slot + 1 : slot_offsets[slot + 1]) {}

    __host__ __device__ bool next(RowStep& step) {
        while (row_ >= row_end_) {
            if (next_ >= end_) return false;
            open_group();
        }
        step = {row_, row_end_};
        row_ += kRows;
        return true;
    }

    // Of a walk that has not begun.
    __host__ __device__ int num_steps() const {
        SlotRowWalk walk = *this;
        int num_steps = 0;
        while (walk.next_ < walk.end_) {
            walk.open_group();
            num_steps += ceil_div(walk.row_end_ - walk.row_, kRows);
        }
        return num_steps;
    }

 private:
    __host__ __device__ void open_group() {
        const int group_idx = slot_groups_ == nullptr ? next_ : slot_groups_[next_];
        ++next_;
        row_ = group_offsets_[group_idx];
        row_end_ = group_offsets_[group_idx + 1];
    }

    const int32_t* group_offsets_ = nullptr;
    const int32_t* slot_groups_ = nullptr;
    int next_ = 0;
    int end_ = 0;
    int row_ = 0;
    int row_end_ = 0;
};

// What a block walks over, by its kernel's arguments: those of all architectures name these alike.
template <class Config, template <class> class Arguments, class Epilogue>
__device__ TileScheduler<Config::kTileM> make_tile_scheduler(const Arguments<Epilogue>& arguments) {
    const int columns = arguments.num_columns / Epilogue::kNumColumnBlocks;
    const int num_n_tiles = ceil_div(columns, Config::kTileN / Epilogue::kNumColumnBlocks);
    return {arguments.group_offsets, arguments.num_groups, num_n_tiles, ptx::block_idx(), ptx::num_blocks()};
}

template <class Arguments>
__device__ int slot_of(const Arguments& arguments, const Tile& tile) {
    return arguments.slots == nullptr ? tile.group_idx : arguments.slots[tile.group_idx];
}

template <class Config, class Arguments>
__device__ SlotTileScheduler make_slot_scheduler(const Arguments& arguments) {
    return {arguments.num_slots, ceil_div(arguments.a.width, Config::kTileM),
            ceil_div(arguments.b.width, Config::kTileN), ptx::block_idx(), ptx::num_blocks()};
}

template <int kRows, class Arguments>
__device__ SlotRowWalk<kRows> rows_of(const Arguments& arguments, int slot) {
    return {arguments.group_offsets, arguments.slot_offsets, arguments.slot_groups, slot};
}

}  // namespace moetrain::gemm
