// Tiles of bf16 in shared memory as TMA writes them and wgmma reads them, and the 64-bit descriptors of such tiles.
// PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout": canonical layouts, strides, matrix descriptor.
//
// Plain integer code, the same on the device and under emulation: the emulation decodes what this file encodes.
//
// A block of a tile has rows of 32, 64 or 128 bytes (its swizzle's width) without gaps; 8 rows are an atom. The rows
// run along M or N in a K-major tile and along K in an MN-major one, whose rows therefore hold consecutive M or N.
#pragma once

#include <cstdint>

#include "cuda/common/major.h"
#include "cuda/ptx/launch.h"

namespace moetrain {

constexpr int kSwizzleRowBytes = 128;  // of Swizzle::k128, the usual one
constexpr int kSwizzleRowElements = kSwizzleRowBytes / 2;
constexpr int kSwizzleAtomBytes = 8 * kSwizzleRowBytes;
constexpr int kChunkBytes = 16;  // what the swizzle permutes, and what one cp.async moves
constexpr int kChunkElements = kChunkBytes / 2;

// Bytes of a row; for kNone, of a core matrix's row.
__host__ __device__ constexpr int swizzle_row_bytes(Swizzle swizzle) { return 16 << static_cast<int>(swizzle); }

// Byte offset of 16-byte chunk `chunk_idx` of row `row_idx` of a block that starts on an atom boundary: where TMA puts
// it, for writers other than TMA.
template <Swizzle kSwizzle = Swizzle::k128>
__host__ __device__ constexpr int swizzled_chunk_offset(int row_idx, int chunk_idx) {
    static_assert(kSwizzle != Swizzle::kNone);
    constexpr int kRowBytes = swizzle_row_bytes(kSwizzle);
    // The hardware exchanges address bits from 4 on with themselves XOR those from 7 on: 1, 2 or 3 bits.
    const int row_of_128_bytes = row_idx * kRowBytes / 128;
    return row_idx * kRowBytes + ((chunk_idx ^ (row_of_128_bytes & (kRowBytes / kChunkBytes - 1))) * kChunkBytes);
}

__host__ __device__ constexpr uint64_t encode_descriptor(uint32_t shared_address, uint32_t leading_bytes,
                                                         uint32_t stride_bytes, Swizzle swizzle) {
    // 1: 128 bytes, 2: 64, 3: 32
    const uint64_t mode = swizzle == Swizzle::kNone ? 0 : 4 - static_cast<uint64_t>(swizzle);
    return static_cast<uint64_t>((shared_address & 0x3FFFF) >> 4) | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
           static_cast<uint64_t>(stride_bytes >> 4) << 32 | mode << 62;
}

// Descriptor of a K-major tile at `shared_address`: an atom boundary, plus 32 bytes for each step of 16 along K inside
// the row (the hardware swizzles address bits, so the step is added before swizzling). Atoms follow one another.
template <Swizzle kSwizzle = Swizzle::k128>
__host__ __device__ constexpr uint64_t make_k_major_descriptor(uint32_t shared_address) {
    static_assert(kSwizzle != Swizzle::kNone);
    constexpr uint32_t kLeadingBytes = 16;  // not used by swizzled K-major layouts; by convention one unit
    return encode_descriptor(shared_address, kLeadingBytes, 8 * swizzle_row_bytes(kSwizzle), kSwizzle);
}

// Descriptor of an MN-major tile: blocks of one row's elements along M or N lie `block_bytes` apart, and in a block
// each step of 8 along K is an atom. A step of 16 along K advances `shared_address` by two atoms.
template <Swizzle kSwizzle = Swizzle::k128>
__host__ __device__ constexpr uint64_t make_mn_major_descriptor(uint32_t shared_address, uint32_t block_bytes) {
    static_assert(kSwizzle != Swizzle::kNone);
    return encode_descriptor(shared_address, block_bytes, 8 * swizzle_row_bytes(kSwizzle), kSwizzle);
}

}  // namespace moetrain
