// Vectors for tests of the simple kernels: random ones, rows that lie apart, comparisons.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "expect.h"

namespace moetrain::test {

using Random = std::mt19937_64;

constexpr int32_t kGuard = -77;

inline std::vector<int32_t> random_ids(Random& random, int64_t size, int32_t low, int32_t high) {
    std::uniform_int_distribution<int32_t> uniform(low, high - 1);
    std::vector<int32_t> ids(static_cast<size_t>(size));
    for (int32_t& id : ids)
        id = uniform(random);
    return ids;
}

inline std::vector<float> random_floats(Random& random, int64_t size) {
    std::uniform_real_distribution<float> uniform(-1, 1);
    std::vector<float> values(static_cast<size_t>(size));
    for (float& value : values)
        value = uniform(random);
    return values;
}

template <class T>
void expect_equal(const std::vector<T>& actual, const std::vector<T>& expected, const std::string& what) {
    for (size_t i = 0; i < expected.size(); ++i)
        expect(actual[i] == expected[i], what + "[" + std::to_string(i) + "]: expected " + std::to_string(expected[i]) +
                                             ", got " + std::to_string(actual[i]));
}

inline void expect_near(double actual, double expected, double tolerance, const std::string& what) {
    if (std::abs(actual - expected) <= tolerance) return;  // false for NaN
    std::ostringstream message;
    message << what << ": expected " << expected << " within " << tolerance << ", got " << actual;
    throw std::runtime_error(message.str());
}

// `rows` of `width` values, `stride` apart; between them lie NaNs, which nothing may read.
template <class T>
std::vector<T> set_apart(const std::vector<T>& rows, int64_t width, int64_t stride) {
    const auto num_rows = static_cast<int64_t>(rows.size()) / width;
    std::vector<T> apart(static_cast<size_t>(num_rows * stride), std::numeric_limits<T>::quiet_NaN());
    for (int64_t i = 0; i < num_rows; ++i)
        std::copy_n(rows.begin() + i * width, width, apart.begin() + i * stride);
    return apart;
}

}  // namespace moetrain::test
