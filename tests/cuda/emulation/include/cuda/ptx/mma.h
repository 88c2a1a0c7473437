// Emulation of ptx/mma.h: fragments to matrices, product, and back.
#pragma once

#include <bit>
#include <cstdint>

#include "cuda/ptx/launch.h"

namespace moetrain::emulation {

struct MmaLane {
    const uint32_t* a;
    uint32_t b[2];
    float* sums;
};

inline float bf16_half(uint32_t word, int half) { return std::bit_cast<float>(word >> 16 * half << 16); }

}  // namespace moetrain::emulation

namespace moetrain::ptx {

inline void mma_m16n8k16(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    emulation::MmaLane own{a, {b0, b1}, sums};
    emulation::current_block().meet_in_warp("mma", 0xFFFFFFFF, &own, [](const emulation::EmulatedBlock::Lanes& lanes) {
        float a_rows[16][16];
        float b_columns[8][16];
        for (int i = 0; i < 32; ++i) {
            const auto& lane = *static_cast<emulation::MmaLane*>(lanes[i]);
            const int group = i / 4;
            for (int half = 0; half < 2; ++half) {
                const int k = i % 4 * 2 + half;
                for (int word = 0; word < 4; ++word)
                    a_rows[group + 8 * (word % 2)][k + 8 * (word / 2)] = emulation::bf16_half(lane.a[word], half);
                for (int word = 0; word < 2; ++word)
                    b_columns[group][k + 8 * word] = emulation::bf16_half(lane.b[word], half);
            }
        }
        for (int i = 0; i < 32; ++i) {
            const auto& lane = *static_cast<emulation::MmaLane*>(lanes[i]);
            for (int j = 0; j < 4; ++j) {
                const float* row = a_rows[i / 4 + 8 * (j / 2)];
                const float* column = b_columns[i % 4 * 2 + j % 2];
                for (int k = 0; k < 16; ++k)
                    lane.sums[j] += row[k] * column[k];
            }
        }
    });
}

}  // namespace moetrain::ptx
