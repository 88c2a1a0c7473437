// Tensors for tests of emulated kernels.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <new>
#include <random>

#include "cuda/common/bf16.h"
#include "emulation/block_runner.h"

namespace moetrain::test {

constexpr uint16_t kUntouched = 0x7FA5;  // a NaN that no kernel writes

inline float to_float(Bf16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

// A bf16 tensor at an address that TMA accepts, in an allocation of exactly its size (for AddressSanitizer).
class Bf16Buffer {
 public:
    explicit Bf16Buffer(size_t size) : data_(new (kAlignment) Bf16[size]), size_(size) {}
    ~Bf16Buffer() { operator delete[](data_, kAlignment); }
    Bf16Buffer(const Bf16Buffer&) = delete;
    Bf16Buffer& operator=(const Bf16Buffer&) = delete;

    Bf16* data() { return data_; }
    Bf16& operator[](size_t i) { return data_[i]; }
    emulation::GlobalRange range() const { return {data_, size_ * sizeof(Bf16)}; }
    size_t size() const { return size_; }
    void fill(uint16_t bits) {
        for (size_t i = 0; i < size_; ++i)
            data_[i].bits = bits;
    }
    void fill_random(std::mt19937_64& random, float scale) {
        std::uniform_real_distribution<float> uniform(-scale, scale);
        for (size_t i = 0; i < size_; ++i)
            data_[i].bits = static_cast<uint16_t>(std::bit_cast<uint32_t>(uniform(random)) >> 16);
    }

 private:
    static constexpr std::align_val_t kAlignment{128};
    Bf16* data_;
    size_t size_;
};

inline const char* name_of(emulation::Timing timing) {
    using emulation::Timing;
    return timing == Timing::kEarly ? "early" : timing == Timing::kLate ? "late" : "random";
}

}  // namespace moetrain::test
