// Emulation of ptx/warp.h.
#pragma once

#include <cstdint>
#include <utility>

#include "cuda/ptx/launch.h"

namespace moetrain::emulation {

// Every lane brings a value and takes the one that lane source(own lane) brought.
template <class T, class Source>
T exchange_in_warp(const char* what, uint32_t mask, T value, const Source& source) {
    EmulatedBlock& block = current_block();
    struct Lane {
        T brought;
        int source;
        T taken;
    } own{value, source(block.thread().thread_idx % 32), value};
    block.meet_in_warp(what, mask, &own, [&block, mask](const EmulatedBlock::Lanes& lanes) {
        for (int i = 0; i < 32; ++i) {
            if ((mask >> i & 1) == 0) continue;
            auto& lane = *static_cast<Lane*>(lanes[i]);
            if ((mask >> lane.source & 1) == 0) block.fail("shuffle from lane " + std::to_string(lane.source));
            lane.taken = static_cast<Lane*>(lanes[lane.source])->brought;
        }
    });
    return own.taken;
}

// The lanes, a bit each, whose value satisfies test(value, own value).
template <class T, class Test>
uint32_t lanes_in_warp(const char* what, uint32_t mask, T value, const Test& test) {
    struct Lane {
        T brought;
        uint32_t found;
    } own{value, 0};
    current_block().meet_in_warp(what, mask, &own, [&](const EmulatedBlock::Lanes& lanes) {
        for (int i = 0; i < 32; ++i)
            for (int j = 0; j < 32; ++j)
                if ((mask >> i & mask >> j & 1) != 0 &&
                    test(static_cast<Lane*>(lanes[j])->brought, static_cast<Lane*>(lanes[i])->brought))
                    static_cast<Lane*>(lanes[i])->found |= 1U << j;
    });
    return own.found;
}

// Of the values that lanes bring, the one that beats(it, other) every other that differs.
template <class T, class Beats>
T best_in_warp(const char* what, uint32_t mask, T value, const Beats& beats) {
    T own = value;
    current_block().meet_in_warp(what, mask, &own, [&](const EmulatedBlock::Lanes& lanes) {
        const T* best = nullptr;
        for (int i = 0; i < 32; ++i) {
            const auto* brought = static_cast<const T*>(lanes[i]);
            if ((mask >> i & 1) != 0 && (best == nullptr || beats(*brought, *best))) best = brought;
        }
        const T taken = *best;
        for (int i = 0; i < 32; ++i)
            if ((mask >> i & 1) != 0) *static_cast<T*>(lanes[i]) = taken;
    });
    return own;
}

}  // namespace moetrain::emulation

namespace moetrain::ptx {

constexpr uint32_t kWholeWarp = 0xFFFFFFFF;

template <class T>
T shuffle_xor(T value, int lane_mask) {
    return emulation::exchange_in_warp("shuffle_xor", kWholeWarp, value, [=](int lane) { return lane ^ lane_mask; });
}
template <class T>
T shuffle(T value, int source) {
    return emulation::exchange_in_warp("shuffle", kWholeWarp, value, [=](int) { return source % 32; });
}

inline uint32_t lanes_where(bool predicate) {
    return emulation::lanes_in_warp("lanes_where", kWholeWarp, predicate, [](bool other, bool) { return other; });
}

template <int kNumLanes = 32>
float sum_over_lanes(float value) {
    for (int step = kNumLanes / 2; step > 0; step /= 2)
        value += shuffle_xor(value, step);
    return value;
}

}  // namespace moetrain::ptx
