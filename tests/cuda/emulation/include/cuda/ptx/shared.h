// Emulation of ptx/shared.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/ptx/launch.h"

namespace moetrain::emulation {

// One lane's part in ldmatrix or stmatrix.
struct MatrixLane {
    uint8_t* row;  // of matrix lane/8, row lane%8
    uint32_t words[4];
};

// Calls move(word of a lane's register, its half, pointer to the element in shared memory) for the four matrices.
template <bool kTranspose, class Move>
void for_each_matrix_element(const EmulatedBlock::Lanes& lanes, const Move& move) {
    const auto lane = [&lanes](int idx) { return static_cast<MatrixLane*>(lanes[static_cast<size_t>(idx)]); };
    for (int matrix = 0; matrix < 4; ++matrix)
        for (int lane_idx = 0; lane_idx < 32; ++lane_idx)
            for (int half = 0; half < 2; ++half) {
                const int major = lane_idx / 4;
                const int minor = lane_idx % 4 * 2 + half;
                const int row = kTranspose ? minor : major;
                const int column = kTranspose ? major : minor;
                move(lane(lane_idx)->words[matrix], half, lane(8 * matrix + row)->row + 2 * column);
            }
}

// The eight rows of a matrix are fetched at once: two of them in the same banks would have to take turns.
inline void require_different_banks(EmulatedBlock& block, const EmulatedBlock::Lanes& lanes) {
    constexpr int kNumPlaces = 8;  // of 16 bytes, in the 128 of all banks
    const auto row = [&lanes](int idx) { return static_cast<MatrixLane*>(lanes[static_cast<size_t>(idx)])->row; };
    for (int matrix = 0; matrix < 4; ++matrix) {
        const uint8_t* row_at[kNumPlaces] = {};
        for (int i = 0; i < kNumPlaces; ++i) {
            const uint8_t* own = row(8 * matrix + i);
            const uint8_t*& other = row_at[block.shared_address(own) / 16 % kNumPlaces];
            if (other != nullptr && other != own)
                block.fail("bank conflict: ldmatrix reads rows at " + hex(block.shared_address(other)) + " and " +
                           hex(block.shared_address(own)) + " as one matrix");
            other = own;
        }
    }
}

inline uint8_t* matrix_row(const void* row) {
    EmulatedBlock& block = current_block();
    const uint32_t address = block.shared_address(row);
    if (address % 16 != 0) block.fail("the rows of ldmatrix and stmatrix must be multiples of 16, got " + hex(address));
    return static_cast<uint8_t*>(const_cast<void*>(row));
}

}  // namespace moetrain::emulation

namespace moetrain::ptx {

inline void fence_async_proxy() {
    emulation::EmulatedBlock& block = emulation::current_block();
    block.shared().fence_async_proxy(block.thread().thread_idx);
}

struct alignas(16) Words4 {
    uint32_t word[4];
};

inline Words4 load_shared_16_bytes(const void* shared) {
    Words4 value;
    emulation::current_block().shared().read(&value, shared, 16);
    return value;
}
inline void store_shared_16_bytes(void* shared, const Words4& value) {
    emulation::EmulatedBlock& block = emulation::current_block();
    block.shared().write(shared, &value, 16, block.thread().thread_idx);
}
inline void store_shared_4_bytes(void* shared, uint32_t value) {
    emulation::EmulatedBlock& block = emulation::current_block();
    block.shared().write(shared, &value, 4, block.thread().thread_idx);
}

template <bool kTranspose = false>
void ldmatrix_x4(uint32_t (&words)[4], const void* row) {
    emulation::EmulatedBlock& block = emulation::current_block();
    emulation::MatrixLane own{emulation::matrix_row(row), {}};
    block.meet_in_warp("ldmatrix", 0xFFFFFFFF, &own, [&block](const emulation::EmulatedBlock::Lanes& lanes) {
        emulation::require_different_banks(block, lanes);
        emulation::for_each_matrix_element<kTranspose>(lanes, [&block](uint32_t& word, int half, uint8_t* element) {
            uint32_t both;  // the aligned pair that holds the element
            block.shared().read(&both, element - reinterpret_cast<uintptr_t>(element) % 4, 4);
            const uint32_t bits = both >> 8 * (reinterpret_cast<uintptr_t>(element) % 4) & 0xFFFF;
            word = half == 0 ? bits : word | bits << 16;
        });
    });
    std::memcpy(words, own.words, sizeof(words));
}

template <bool kTranspose = false>
void stmatrix_x4(void* row, const uint32_t (&words)[4]) {
    emulation::EmulatedBlock& block = emulation::current_block();
    emulation::MatrixLane own{emulation::matrix_row(row), {words[0], words[1], words[2], words[3]}};
    const int first_thread = block.thread().thread_idx / 32 * 32;
    block.meet_in_warp("stmatrix", 0xFFFFFFFF, &own, [&](const emulation::EmulatedBlock::Lanes& lanes) {
        uint16_t tiles[4][8][8];
        const auto lane = [&lanes](int idx) { return static_cast<emulation::MatrixLane*>(lanes[idx]); };
        for (int matrix = 0; matrix < 4; ++matrix)
            for (int lane_idx = 0; lane_idx < 32; ++lane_idx)
                for (int half = 0; half < 2; ++half) {
                    const auto bits = static_cast<uint16_t>(lane(lane_idx)->words[matrix] >> 16 * half);
                    const int major = lane_idx / 4;
                    const int minor = lane_idx % 4 * 2 + half;
                    (kTranspose ? tiles[matrix][minor][major] : tiles[matrix][major][minor]) = bits;
                }
        // A row counts as written by lanes whose registers went there; all of the warp's fence it or none.
        for (int i = 0; i < 32; ++i)
            for (int word = 0; word < 4; ++word)
                block.shared().write(lane(i)->row + 4 * word, &tiles[i / 8][i % 8][2 * word], 4,
                                     first_thread + (kTranspose ? 8 * word + i % 8 / 2 : i % 8 * 4 + word));
    });
}

}  // namespace moetrain::ptx
