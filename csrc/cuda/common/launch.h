// What launchers and their callers share. No torch header.
#pragma once
#include <cstdint>

namespace moetrain {

enum class Element : int8_t { kFloat, kBFloat16, kHalf, kDouble };

constexpr int64_t kNoBreach = INT64_MAX;  // where a debug check writes the least bad position

}  // namespace moetrain
