// Which output tile a block computes next. Runs on the device and on the host.
#pragma once

#include <cstdint>

#include "cuda/ptx/launch.h"

namespace moetrain::sm90 {

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

}  // namespace moetrain::sm90
