// What the tests of grouped GEMMs share: buffers with guards, groups of rows, every timing.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <new>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "cuda/common/bf16.h"
#include "emulation/block_runner.h"
#include "expect.h"

namespace moetrain::test {

using emulation::GridOptions;
using emulation::Timing;

inline double to_double(Bf16 x) { return std::bit_cast<float>(uint32_t{x.bits} << 16); }

inline double to_double(float x) { return x; }

// Elements at an address that TMA accepts, in an allocation of exactly its size (for AddressSanitizer), with guards
// that no kernel may touch before and after them. Everything starts as a NaN that no kernel writes.
template <class T>
class Buffer {
 public:
    explicit Buffer(size_t size, size_t num_guards = 0)
        : bytes_(new (kAlignment) uint8_t[(size + 2 * rounded(num_guards)) * sizeof(T)]),
          size_(size),
          num_guards_(rounded(num_guards)) {
        for (size_t i = 0; i < size_ + 2 * num_guards_; ++i)
            reinterpret_cast<T*>(bytes_)[i] = untouched();
    }
    ~Buffer() { operator delete[](bytes_, kAlignment); }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    T* data() { return reinterpret_cast<T*>(bytes_) + num_guards_; }
    T& operator[](size_t i) { return data()[i]; }
    size_t size() const { return size_; }
    emulation::GlobalRange range() const { return {bytes_ + num_guards_ * sizeof(T), size_ * sizeof(T)}; }

    void fill_random(std::mt19937_64& random, float scale) {
        std::uniform_real_distribution<float> uniform(-scale, scale);
        for (size_t i = 0; i < size_; ++i) {
            const float value = uniform(random);
            if constexpr (sizeof(T) == 2)
                data()[i] = {static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16)};
            else
                data()[i] = value;
        }
    }

    // `first` on, of the guards and what the kernel was not to write.
    void expect_untouched_from(size_t first, const std::string& what) {
        const auto is_untouched = [](const T& value) {
            const T marker = untouched();
            return std::memcmp(&value, &marker, sizeof(T)) == 0;
        };
        for (size_t i = 0; i < num_guards_; ++i)
            expect(is_untouched(reinterpret_cast<T*>(bytes_)[i]), what + ": a value before the output was written");
        for (size_t i = first; i < size_ + num_guards_; ++i)
            expect(is_untouched(data()[i]), what + ": a value outside the output was written");
    }

 private:
    static constexpr std::align_val_t kAlignment{128};
    static size_t rounded(size_t num_guards) { return (num_guards + 63) / 64 * 64; }
    static T untouched() {
        if constexpr (sizeof(T) == 2)
            return {0x7FA5};
        else
            return std::bit_cast<T>(0x7FA5A5A5);
    }

    uint8_t* bytes_;
    size_t size_;
    size_t num_guards_;
};

using Bf16Buffer = Buffer<Bf16>;
using FloatBuffer = Buffer<float>;

inline std::vector<int32_t> offsets_of(const std::vector<int>& group_sizes) {
    std::vector<int32_t> offsets{0};
    for (const int size : group_sizes)
        offsets.push_back(offsets.back() + size);
    return offsets;
}

// A sum of products in float64, and how far fp32 accumulation may be from it.
struct Sum {
    double value = 0;
    double error = 0;

    void add(double x, double y) {
        value += x * y;
        error += std::abs(x * y);
        ++num_terms;
    }
    double fp32_error() const { return error * (num_terms + 1) * 0x1p-24; }

 private:
    int num_terms = 0;
};

// `error` is what precedes the rounding of the stored value, to bf16 where `is_bf16`.
inline void expect_near(double actual, double expected, double error, bool is_bf16, const std::string& where) {
    const double tolerance = std::abs(expected) * (is_bf16 ? 0x1.02p-8 : 0x1p-22) + 1.01 * error + 1e-30;
    if (std::abs(actual - expected) <= tolerance) return;  // false for NaN
    std::ostringstream message;
    message << where << ": expected " << expected << " within " << tolerance << ", got " << actual;
    throw std::runtime_error(message.str());
}

inline std::string at(const std::string& what, int64_t row, int64_t column) {
    return what + ", row " + std::to_string(row) + ", column " + std::to_string(column);
}

// Runs `check(timing, seed)` early, late, and with several random seeds.
template <class Check>
void check_all_timings(Runner& runner, const std::string& name, const Check& check) {
    runner.run(name + ", early", [&] { check(Timing::kEarly, uint64_t{1}); });
    runner.run(name + ", late", [&] { check(Timing::kLate, uint64_t{2}); });
    for (uint64_t seed = 3; seed < 6; ++seed)
        runner.run(name + ", random, seed " + std::to_string(seed), [&] { check(Timing::kRandom, seed); });
}

// A test's grid; the launch that runs it knows the block.
inline GridOptions grid_of(int num_blocks, Timing timing, uint64_t seed,
                           const std::vector<emulation::GlobalRange>& tensors) {
    return {.num_blocks = num_blocks,
            .num_threads = 0,
            .shared_bytes = 0,
            .seed = seed,
            .timing = timing,
            .tensors = tensors};
}

template <class Config, class Storage>
GridOptions with_block(GridOptions grid) {
    grid.num_threads = Config::kNumThreads;
    grid.shared_bytes = sizeof(Storage);
    return grid;
}

}  // namespace moetrain::test
