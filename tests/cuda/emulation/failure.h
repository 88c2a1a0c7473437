#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace moetrain::emulation {

// A deadlock, or something PTX does not define.
class Failure : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

std::string hex(uint64_t value);

}  // namespace moetrain::emulation
