// Small kernels that use the primitives the grouped GEMM does not, against plain references.
#include <cmath>
#include <cstdio>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "expect.h"
#include "kernels/ping_pong.h"
#include "kernels/transposed_gemm.h"
#include "kernels/warp_gemm.h"
#include "tensors.h"

namespace moetrain::test {
namespace {

using emulation::GlobalRange;
using emulation::run_grid;
using emulation::Timing;

// Fails unless `actual` is the sum of a(k) · b(k) up to fp32 accumulation and a relative error of `rounding`.
template <class A, class B>
void expect_dot(float actual, int depth, const A& a, const B& b, double rounding, const std::string& where) {
    double sum = 0;
    double magnitude = 0;
    for (int k = 0; k < depth; ++k) {
        const double product = static_cast<double>(to_float(a(k))) * to_float(b(k));
        sum += product;
        magnitude += std::abs(product);
    }
    const double tolerance = std::abs(sum) * rounding + magnitude * depth * 0x1p-24 + 1e-30;
    if (std::abs(actual - sum) <= tolerance) return;  // false for NaN
    std::ostringstream message;
    message << where << ": expected " << sum << " within " << tolerance << ", got " << actual;
    throw std::runtime_error(message.str());
}

std::string place(int row, int column) { return "row " + std::to_string(row) + ", column " + std::to_string(column); }

template <class Config>
void check_transposed_gemm(int num_rows, int num_columns, int depth, Timing timing, uint64_t seed) {
    std::mt19937_64 random(seed);
    Bf16Buffer a(static_cast<size_t>(depth) * num_rows);
    Bf16Buffer b(static_cast<size_t>(depth) * num_columns);
    Bf16Buffer out(static_cast<size_t>(num_rows) * num_columns);
    a.fill_random(random, 1.0f);
    b.fill_random(random, 1.0f);
    out.fill(kUntouched);
    const auto arguments = make_transposed_gemm<Config>(a.data(), b.data(), out.data(), num_rows, num_columns, depth);
    run_grid({.num_blocks = (num_rows + Config::kTileI - 1) / Config::kTileI,
              .num_threads = Config::kNumThreads,
              .shared_bytes = sizeof(TransposedGemmStorage<Config>),
              .seed = seed,
              .timing = timing,
              .tensors = {a.range(), b.range(), out.range()}},
             [&] { transposed_gemm_kernel<Config>(arguments); });
    for (int row = 0; row < num_rows; ++row)
        for (int column = 0; column < num_columns; ++column)
            expect_dot(
                to_float(out[static_cast<size_t>(row) * num_columns + column]), depth,
                [&](int k) { return a[static_cast<size_t>(k) * num_rows + row]; },
                [&](int k) { return b[static_cast<size_t>(k) * num_columns + column]; }, 0x1.02p-8, place(row, column));
}

template <bool kTransposeB>
void check_warp_gemm(int num_rows, int num_columns, int depth, Timing timing, uint64_t seed) {
    std::mt19937_64 random(seed);
    Bf16Buffer a(static_cast<size_t>(num_rows) * depth);
    Bf16Buffer b(static_cast<size_t>(num_columns) * depth);
    std::vector<float> out(static_cast<size_t>(num_rows) * num_columns, std::nanf(""));
    a.fill_random(random, 1.0f);
    b.fill_random(random, 1.0f);
    const int num_row_tiles = (num_rows + kWarpGemmRows - 1) / kWarpGemmRows;
    const WarpGemmArguments arguments{a.data(), b.data(), out.data(), num_rows, num_columns, depth};
    run_grid({.num_blocks = num_row_tiles * (num_columns / kWarpGemmSide),
              .num_threads = kWarpGemmThreads,
              .shared_bytes = sizeof(WarpGemmStorage),
              .seed = seed,
              .timing = timing,
              .tensors = {a.range(), b.range()}},
             [&] { warp_gemm_kernel<kTransposeB>(arguments); });
    for (int row = 0; row < num_rows; ++row)
        for (int column = 0; column < num_columns; ++column)
            expect_dot(
                out[static_cast<size_t>(row) * num_columns + column], depth,
                [&](int k) { return a[static_cast<size_t>(row) * depth + k]; },
                [&](int k) {
                    return b[kTransposeB ? static_cast<size_t>(k) * num_columns + column
                                         : static_cast<size_t>(column) * depth + k];
                },
                0, place(row, column));
}

void check_ping_pong(int num_turns, Timing timing, uint64_t seed) {
    std::vector<int32_t> out(static_cast<size_t>(num_turns), -1);
    run_grid({.num_blocks = 1, .num_threads = kPingPongThreads, .shared_bytes = 256, .seed = seed, .timing = timing},
             [&] { ping_pong_kernel(out.data(), num_turns); });
    for (int turn = 0; turn < num_turns; ++turn)
        expect(out[static_cast<size_t>(turn)] == 128 * turn,
               "turn " + std::to_string(turn) + ": expected 128 threads to see " + std::to_string(turn) +
                   " turns, their sum is " + std::to_string(out[static_cast<size_t>(turn)]));
}

template <class Check>
void with_all_timings(Runner& runner, const std::string& name, const Check& check) {
    for (const Timing timing : {Timing::kEarly, Timing::kLate, Timing::kRandom})
        for (uint64_t seed = 1; seed <= (timing == Timing::kRandom ? 3 : 1); ++seed) {
            std::ostringstream label;
            label << name << ", " << name_of(timing) << ", seed " << seed;
            runner.run(label.str(), [&] { check(timing, seed); });
        }
}

template <class Config>
void with_all_timings(Runner& runner, const std::string& name, int num_rows, int num_columns, int depth) {
    with_all_timings(runner, "transposed GEMM, " + name, [&](Timing timing, uint64_t seed) {
        check_transposed_gemm<Config>(num_rows, num_columns, depth, timing, seed);
    });
}

}  // namespace
}  // namespace moetrain::test

int main() {
    using namespace moetrain;
    using namespace moetrain::test;
    Runner runner;
    with_all_timings<TransposedGemmConfig<128, 64, Swizzle::k128>>(runner, "128-byte swizzle", 64, 256, 128);
    with_all_timings<TransposedGemmConfig<64, 32, Swizzle::k64>>(
        runner, "64-byte swizzle, nothing a multiple of a tile", 72, 136, 56);
    with_all_timings<TransposedGemmConfig<192, 16, Swizzle::k32>>(runner, "32-byte swizzle", 64, 192, 48);
    with_all_timings(runner, "warp GEMM",
                     [](Timing timing, uint64_t seed) { check_warp_gemm<false>(40, 32, 80, timing, seed); });
    with_all_timings(runner, "warp GEMM, B transposed",
                     [](Timing timing, uint64_t seed) { check_warp_gemm<true>(33, 48, 48, timing, seed); });
    with_all_timings(runner, "ping-pong", [](Timing timing, uint64_t seed) { check_ping_pong(7, timing, seed); });
    return runner.exit_code();
}
