// What Ampere's grouped GEMMs share: a ring of stages that cp.async fills, and the products of one tile by mma.sync.
// bf16 operands in shared memory, fp32 accumulators in registers.
//
// All warps copy and all multiply. A step takes 32 of K: while it is multiplied, the copies of the next steps are in
// flight, of the next tile's too, so that they also run beside the epilogue; and each half of a step is multiplied from
// registers while ldmatrix fetches the other.
#pragma once

#include <cstdint>

#include "cuda/common/bf16.h"
#include "cuda/common/major.h"
#include "cuda/common/matrix_descriptor.h"
#include "cuda/grouped_gemm/epilogue.h"
#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/launch.h"
#include "cuda/ptx/mma.h"
#include "cuda/ptx/shared.h"

namespace moetrain::sm80 {

using namespace gemm;

constexpr int kWarpSize = 32;
constexpr int kStepDepth = 32;                    // of K
constexpr int kHalfStep = 16;                     // K of one mma
constexpr int kMmaRows = 16;                      // rows of a block of accumulators, see FragmentPosition
constexpr int kPairColumns = 16;                  // columns that one ldmatrix fetches: two octets
constexpr int kBlockWidth = kSwizzleRowElements;  // of M or N, in a row of an MN-major tile

struct GemmShape {
    int tile_m;
    int tile_n;
    int num_stages;
    int blocks_per_multiprocessor = 1;  // beyond one, the epilogue of one block runs beside the products of another
    int warp_m = 64;                    // of a warp's part of the tile
    int warp_n = 64;
    Major major_a = Major::kK;
    Major major_b = Major::kK;
};

template <GemmShape kShape>
struct GemmConfig {
    static constexpr int kTileM = kShape.tile_m;
    static constexpr int kTileN = kShape.tile_n;
    static constexpr int kWarpM = kShape.warp_m;
    static constexpr int kWarpN = kShape.warp_n;
    static constexpr int kNumStages = kShape.num_stages;
    static constexpr int kBlocksPerMultiprocessor = kShape.blocks_per_multiprocessor;
    static constexpr Major kMajorA = kShape.major_a;
    static constexpr Major kMajorB = kShape.major_b;

    static constexpr int kWarpsM = kTileM / kWarpM;
    static constexpr int kWarpsN = kTileN / kWarpN;
    static constexpr int kNumThreads = kWarpSize * kWarpsM * kWarpsN;
    static constexpr int kRowBlocks = kWarpM / kMmaRows;  // of one warp
    static constexpr int kPairs = kWarpN / kPairColumns;  // of octets

    static_assert(kTileM == kWarpsM * kWarpM && kWarpM == kRowBlocks * kMmaRows);
    static_assert(kTileN == kWarpsN * kWarpN && kWarpN % kColumnsPerStep == 0);
    static_assert(kMajorA == Major::kK || kTileM % kBlockWidth == 0);
    static_assert(kMajorB == Major::kK || kTileN % kBlockWidth == 0);
    static_assert(kNumStages >= 2, "a stage is filled while another is read");
};

// Byte offset in a tile of the 16 bytes that begin at row or column `mn`, at `k`: eight along K of a K-major tile, else
// eight along M or N. Rows of a K-major tile are 64 bytes; an MN-major one is made of blocks of 64 columns, 128 bytes.
// Swizzled, so that neither ldmatrix nor eight neighbouring copies meet in a bank.
template <Major kMajor>
__host__ __device__ constexpr int chunk_offset(int mn, int k) {
    if constexpr (kMajor == Major::kK)
        return swizzled_chunk_offset<Swizzle::k64>(mn, k / kChunkElements);
    else
        return mn / kBlockWidth * (kStepDepth * kSwizzleRowBytes) +
               swizzled_chunk_offset<Swizzle::k128>(k, mn % kBlockWidth / kChunkElements);
}

// The same for the place `mn` and `k` further, multiples of 16: of M or N they stay inside a part of a power of two on
// whose boundary (or eight beyond it) the first place lies, of K inside the tile. Cheap, where they are constants.
template <Major kMajor>
__host__ __device__ constexpr int moved_chunk_offset(int offset, int mn, int k) {
    constexpr int kBytes = sizeof(Bf16);
    if constexpr (kMajor == Major::kK)
        return (offset ^ (k * kBytes)) + mn * kStepDepth * kBytes;
    else
        return (offset ^ (mn % kBlockWidth * kBytes)) + mn / kBlockWidth * (kStepDepth * kSwizzleRowBytes) +
               k * kSwizzleRowBytes;
}

template <class Config>
struct PipelineStorage {
    alignas(kSwizzleAtomBytes) Bf16 a[Config::kNumStages][Config::kTileM * kStepDepth];
    alignas(kSwizzleAtomBytes) Bf16 b[Config::kNumStages][Config::kTileN * kStepDepth];
};

// How the threads share the chunks of a tile, `kWidth` of M or N: neighbours take neighbouring chunks of a row in
// global memory, passes the rows.
template <class Config, Major kMajor, int kWidth>
struct TileCopy {
    static constexpr bool kIsMnMajor = kMajor == Major::kMn;
    static constexpr int kChunksPerRow = (kIsMnMajor ? kWidth : kStepDepth) / kChunkElements;
    static constexpr int kRowsPerPass = Config::kNumThreads / kChunksPerRow;
    static constexpr int kNumPasses = (kIsMnMajor ? kStepDepth : kWidth) / kRowsPerPass;
    static_assert(kRowsPerPass * kChunksPerRow == Config::kNumThreads);
    static_assert(kRowsPerPass * kNumPasses == (kIsMnMajor ? kStepDepth : kWidth));

    __device__ static int row(int pass) { return pass * kRowsPerPass + ptx::thread_idx() / kChunksPerRow; }
    // The first element of the thread's chunk in its rows.
    __device__ static int column() { return ptx::thread_idx() % kChunksPerRow * kChunkElements; }

    // Copies the thread's chunk of pass `pass`, or zeros: `source` then may be any multiple of 16 bytes.
    __device__ static void copy(Bf16* tile, int pass, const Bf16* source, bool is_valid) {
        const int first = kIsMnMajor ? chunk_offset<kMajor>(column(), row(0)) : chunk_offset<kMajor>(row(0), column());
        ptx::cp_async_16_bytes(reinterpret_cast<uint8_t*>(tile) + first + pass * kRowsPerPass * kRowBytes, source,
                               is_valid);
    }

 private:
    static constexpr int kRowBytes = kIsMnMajor ? kSwizzleRowBytes : kStepDepth * static_cast<int>(sizeof(Bf16));
    static_assert(kRowsPerPass % 8 == 0, "the swizzle is the same in every pass");
};

// kNumColumnBlocks: the tile of B is made of the same columns of so many parts, and so is each warp's share of it.
template <class Config, int kNumColumnBlocks>
class Pipeline {
 public:
    using Storage = PipelineStorage<Config>;
    using Accumulators = float[Config::kRowBlocks][Config::kWarpN / 2];

    static constexpr int kTilePart = Config::kTileN / kNumColumnBlocks;
    static constexpr int kWarpPart = Config::kWarpN / kNumColumnBlocks;
    static_assert(kWarpPart % kColumnsPerStep == 0, "an epilogue takes 32 columns at a time");

    __device__ explicit Pipeline(Storage& storage)
        : storage_(storage),
          warp_m_(ptx::thread_idx() / kWarpSize % Config::kWarpsM),
          warp_n_(ptx::thread_idx() / kWarpSize / Config::kWarpsM),
          a_offset_(lane_offset<Config::kMajorA, true>(warp_row())),
          b_offset_(lane_offset<Config::kMajorB, false>(warp_column())) {}

    __device__ int warp_row() const { return warp_m_ * Config::kWarpM; }
    __device__ int warp_column() const { return warp_n_ * kWarpPart; }  // in each part of the tile
    __device__ int warp_n_idx() const { return warp_n_; }

    // `loader.load_next(stage_idx)` issues the copies of the next step, if there is one, and always commits a group.
    template <class Loader>
    __device__ void fill(Loader& loader) {
        for (int stage_idx = 0; stage_idx + 1 < Config::kNumStages; ++stage_idx)
            loader.load_next(stage_idx);
    }

    // Sets `accumulators` to this warp's share of the sum over the next `num_steps` steps.
    template <class Loader>
    __device__ void multiply_tile(Accumulators& accumulators, Loader& loader, int num_steps) {
        set_to_zero(accumulators);
        if (num_steps == 0) return;
        Fragments first_half;
        Fragments second_half;
        wait_for_step();
        load_fragments(first_half, 0);
        for (int step = 1; step <= num_steps; ++step) {
            loader.load_next(previous_stage_idx());  // all have read it: they have met since
            load_fragments(second_half, kHalfStep);  // behind the copies, whose addresses need registers
            multiply(accumulators, first_half);
            stage_idx_ = stage_idx_ + 1 == Config::kNumStages ? 0 : stage_idx_ + 1;
            if (step < num_steps) {
                wait_for_step();
                load_fragments(first_half, 0);
            }
            multiply(accumulators, second_half);
        }
    }

 private:
    struct Fragments {
        uint32_t a[Config::kRowBlocks][4];
        uint32_t b[Config::kPairs][4];
    };

    __device__ static void set_to_zero(Accumulators& accumulators) {
#pragma unroll
        for (auto& row_block : accumulators)
#pragma unroll
            for (float& accumulator : row_block)
                accumulator = 0;
    }

    __device__ int previous_stage_idx() const { return (stage_idx_ == 0 ? Config::kNumStages : stage_idx_) - 1; }

    // Of the groups committed so far, all but the last kNumStages - 2 have landed, for all threads.
    __device__ static void wait_for_step() {
        ptx::cp_async_wait<Config::kNumStages - 2>();
        ptx::sync_block();
    }

    // Where, in a tile, lies the row that this lane names of the four 8x8 matrices of a 16 x 16 part at `mn`: words 0
    // and 1 differ in M for A, in K for B.
    template <Major kMajor, bool kIsA>
    __device__ static int lane_offset(int mn) {
        const int lane_idx = ptx::thread_idx() % kWarpSize;
        const int low = lane_idx / 8 % 2 * 8;
        const int high = lane_idx / 16 * 8;
        const int row = lane_idx % 8;
        const int own_mn = mn + (kIsA ? low : high) + (kMajor == Major::kK ? row : 0);
        const int own_k = (kIsA ? high : low) + (kMajor == Major::kK ? 0 : row);
        return chunk_offset<kMajor>(own_mn, own_k);
    }

    // The half of the current stage from `k` on.
    __device__ void load_fragments(Fragments& fragments, int k) const {
        const auto* a = reinterpret_cast<const uint8_t*>(storage_.a[stage_idx_]);
        const auto* b = reinterpret_cast<const uint8_t*>(storage_.b[stage_idx_]);
#pragma unroll
        for (int block = 0; block < Config::kRowBlocks; ++block)
            ptx::ldmatrix_x4<Config::kMajorA == Major::kMn>(
                fragments.a[block], a + moved_chunk_offset<Config::kMajorA>(a_offset_, block * kMmaRows, k));
#pragma unroll
        for (int pair = 0; pair < Config::kPairs; ++pair) {
            const int column = pair * kPairColumns;
            const int mn = column / kWarpPart * kTilePart + column % kWarpPart;
            ptx::ldmatrix_x4<Config::kMajorB == Major::kMn>(fragments.b[pair],
                                                            b + moved_chunk_offset<Config::kMajorB>(b_offset_, mn, k));
        }
    }

    __device__ static void multiply(Accumulators& accumulators, const Fragments& fragments) {
#pragma unroll
        for (int block = 0; block < Config::kRowBlocks; ++block)
#pragma unroll
            for (int octet = 0; octet < 2 * Config::kPairs; ++octet) {
                auto& sums = reinterpret_cast<float (&)[4]>(accumulators[block][4 * octet]);
                const uint32_t (&b)[4] = fragments.b[octet / 2];
                ptx::mma_m16n8k16(sums, fragments.a[block], b[octet % 2 * 2], b[octet % 2 * 2 + 1]);
            }
    }

    Storage& storage_;
    int warp_m_;
    int warp_n_;
    int a_offset_;
    int b_offset_;
    int stage_idx_ = 0;
};

}  // namespace moetrain::sm80
