// The 64-bit descriptor through which wgmma reads an operand from shared memory.
// PTX ISA, "Asynchronous warpgroup level matrix shared memory layout", matrix descriptor.
//
// Plain integer code, the same on the device and under emulation: the emulation decodes what this file encodes.
#pragma once

#include <cstdint>

#include "cuda/ptx/launch.h"

namespace moetrain {

// A K-major tile in 128-byte swizzle: rows of 64 bf16, in atoms of 8 rows (1024 bytes) stacked without gaps.
constexpr int kSwizzleRowBytes = 128;
constexpr int kSwizzleRowElements = kSwizzleRowBytes / 2;
constexpr int kSwizzleAtomBytes = 8 * kSwizzleRowBytes;
constexpr int kChunkBytes = 16;  // what the swizzle permutes, and what one cp.async moves
constexpr int kChunkElements = kChunkBytes / 2;

// Byte offset of 16-byte chunk `chunk_idx` of row `row_idx`: what TMA does with SWIZZLE_128B, for writers other than
// TMA.
__host__ __device__ constexpr int swizzled_chunk_offset(int row_idx, int chunk_idx) {
    return row_idx * kSwizzleRowBytes + ((chunk_idx ^ (row_idx & 7)) * kChunkBytes);
}

// Descriptor of the tile at `shared_address`, which must lie on an atom boundary plus a multiple of 32 bytes (a step
// of 16 along K inside the swizzle row; the hardware swizzles address bits, so the step is added before swizzling).
__host__ __device__ constexpr uint64_t make_k_major_descriptor(uint32_t shared_address) {
    constexpr uint64_t kLeadingBytes = 16;  // ignored for swizzled K-major layouts; by convention 1 unit
    constexpr uint64_t kStrideBytes = kSwizzleAtomBytes;
    constexpr uint64_t kSwizzle128B = 1;
    return static_cast<uint64_t>((shared_address & 0x3FFFF) >> 4) | (kLeadingBytes >> 4) << 16 |
           (kStrideBytes >> 4) << 32 | kSwizzle128B << 62;
}

}  // namespace moetrain
