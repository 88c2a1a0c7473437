// 2^x and log2(x) of basic operations alone: the same bits on every machine, which no library's functions promise.
#pragma once
#include <bit>
#include <cstdint>

#include "common/clones.h"

namespace moetrain::planner {

// Relative error below 1e-6; x must lie in [-100, 100].
MOETRAIN_INLINE float exp2_of(float x) {
    const int32_t whole = static_cast<int32_t>(x + 127.5f) - 127;  // nearest: what is cut off is positive
    const float t = (x - static_cast<float>(whole)) * 0.69314718f;
    const float tail = 0.041666668f + t * (0.0083333338f + t * 0.0013888889f);
    const float series = 1.0f + t * (1.0f + t * (0.5f + t * (0.16666667f + t * tail)));
    return series * std::bit_cast<float>((whole + 127) << 23);
}

// Absolute error below 1e-6 where |log2(x)| is below 8; x is positive and normal.
MOETRAIN_INLINE float log2_of(float x) {
    constexpr int32_t kRootOfHalf = 0x3f3504f3;
    const int32_t bits = std::bit_cast<int32_t>(x);
    const int32_t exponent = (bits - kRootOfHalf) >> 23;
    const float m = std::bit_cast<float>(bits - (exponent << 23));  // in [sqrt(1/2), sqrt(2))
    const float s = (m - 1.0f) / (m + 1.0f), s2 = s * s;
    const float tail = 0.57707802f + s2 * (0.41219859f + s2 * 0.32059890f);
    return static_cast<float>(exponent) + s * (2.8853901f + s2 * (0.96179669f + s2 * tail));
}

}  // namespace moetrain::planner
