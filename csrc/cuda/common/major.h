#pragma once
#include <cstdint>

namespace moetrain {

enum class Swizzle : uint8_t { kNone, k32, k64, k128 };  // width in bytes of the rows whose chunks it permutes
enum class Major : uint8_t { kK, kMn };                  // the index along which an operand's elements are contiguous

}  // namespace moetrain
