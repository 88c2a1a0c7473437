// Whether operators look at values on the device. No header of CUDA.
#pragma once
#include <cstdlib>
#include <string_view>

namespace moetrain {

// Whether ids are checked on the device and reported, which waits for the device. Read per call: no state.
inline bool debug_checks() {
    const char* value = std::getenv("MOETRAIN_DEBUG");
    return value != nullptr && std::string_view(value) == "1";
}

}  // namespace moetrain
