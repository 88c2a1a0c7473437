// The grouped GEMM with groups along K, against a float64 reference, over any architecture (`Launch`).
#pragma once

#include <random>
#include <type_traits>
#include <vector>

#include "cuda/grouped_gemm/epilogue.h"
#include "cuda/grouped_gemm/problem.h"
#include "gemm_case.h"

namespace moetrain::test {

struct Case {
    std::vector<int> group_sizes;
    int a_width;
    int b_width;
    bool gathers_a = false;
    bool gathers_b = false;
    std::vector<int> slots = {};  // of each group; none: its own
    int num_slots = 0;            // with `slots`
    int num_blocks = 2;
};

// The lists of groups of each slot.
struct SlotLists {
    std::vector<int32_t> offsets{0};
    std::vector<int32_t> groups;

    SlotLists(const std::vector<int>& slots, int num_slots) {
        for (int slot = 0; slot < num_slots; ++slot) {
            for (size_t group_idx = 0; group_idx < slots.size(); ++group_idx)
                if (slots[group_idx] == slot) groups.push_back(static_cast<int32_t>(group_idx));
            offsets.push_back(static_cast<int32_t>(groups.size()));
        }
    }
};

// How a case stores: bf16, fp32, or added to fp32.
enum class Output { kBf16, kFloat, kAdded };

template <class Launch, Output kOutput>
struct Gemm {
    // Rows of what a kernel must not take into a sum: beyond the last group, NaN.
    static constexpr int kNumRowsBeyond = 70;

    const Case& test;
    std::vector<int32_t> offsets = offsets_of(test.group_sizes);
    int num_rows = offsets.back();
    int num_slots = test.slots.empty() ? static_cast<int>(test.group_sizes.size()) : test.num_slots;
    SlotLists lists{test.slots, num_slots};
    std::mt19937_64 random;
    Bf16Buffer a;
    Bf16Buffer b;
    std::vector<int32_t> a_rows;
    std::vector<int32_t> b_rows;
    using Element = std::conditional_t<kOutput == Output::kBf16, Bf16, float>;
    Buffer<Element> out{static_cast<size_t>(num_slots) * test.a_width * test.b_width,
                        static_cast<size_t>(128 * test.b_width)};
    std::vector<double> before = std::vector<double>(out.size());

    static int num_stored(int num_rows, bool gathers) { return gathers ? num_rows / 2 + 3 : num_rows + kNumRowsBeyond; }

    Gemm(const Case& given, uint64_t seed)
        : test(given),
          random(seed),
          a(static_cast<size_t>(num_stored(num_rows, test.gathers_a)) * (test.a_width + 8)),
          b(static_cast<size_t>(num_stored(num_rows, test.gathers_b)) * test.b_width) {
        fill(a, test.a_width + 8, test.gathers_a, a_rows);
        fill(b, test.b_width, test.gathers_b, b_rows);
        for (size_t i = 0; kOutput == Output::kAdded && i < out.size(); ++i) {
            before[i] = static_cast<double>(random() % 64) - 32;
            if constexpr (kOutput == Output::kAdded) out[i] = static_cast<float>(before[i]);
        }
    }

    // A stored row that no pair names stays NaN, too.
    void fill(Bf16Buffer& buffer, int stride, bool gathers, std::vector<int32_t>& rows) {
        buffer.fill_random(random, 1.0f);
        const int num_random = num_stored(num_rows, gathers) - (gathers ? 1 : kNumRowsBeyond);
        for (int row = 0; row < num_rows; ++row)
            rows.push_back(gathers ? static_cast<int32_t>(random() % num_random) : row);
        for (size_t i = static_cast<size_t>(num_random) * stride; i < buffer.size(); ++i)
            buffer[i] = {0x7FC0};
    }

    void run(Timing timing, uint64_t seed) {
        const gemm::VarlenKProblem problem{.a = {.data = a.data(),
                                                 .num_rows = num_stored(num_rows, test.gathers_a),
                                                 .width = test.a_width,
                                                 .stride = test.a_width + 8,
                                                 .row_indices = test.gathers_a ? a_rows.data() : nullptr},
                                           .b = {.data = b.data(),
                                                 .num_rows = num_stored(num_rows, test.gathers_b),
                                                 .width = test.b_width,
                                                 .row_indices = test.gathers_b ? b_rows.data() : nullptr},
                                           .group_offsets = offsets.data(),
                                           .slot_offsets = test.slots.empty() ? nullptr : lists.offsets.data(),
                                           .slot_groups = test.slots.empty() ? nullptr : lists.groups.data(),
                                           .num_slots = num_slots};
        const GridOptions grid = grid_of(test.num_blocks, timing, seed, {a.range(), b.range()});
        if constexpr (kOutput == Output::kBf16)
            Launch::run_varlen_k(problem, gemm::StoreEpilogue{.out = out.data(), .num_columns = test.b_width}, grid);
        else
            Launch::run_varlen_k(problem, gemm::FloatEpilogue{out.data(), test.b_width, kOutput == Output::kAdded},
                                 grid);
    }

    void check() {
        out.expect_untouched_from(out.size(), "out");
        for (int slot = 0; slot < num_slots; ++slot)
            for (int i = 0; i < test.a_width; ++i)
                for (int j = 0; j < test.b_width; ++j)
                    check_value(slot, i, j);
    }

    void check_value(int slot, int i, int j) {
        Sum sum;
        for (size_t group_idx = 0; group_idx < test.group_sizes.size(); ++group_idx) {
            if ((test.slots.empty() ? static_cast<int>(group_idx) : test.slots[group_idx]) != slot) continue;
            for (int row = offsets[group_idx]; row < offsets[group_idx + 1]; ++row)
                sum.add(to_double(a[a_rows[row] * (test.a_width + 8) + i]),
                        to_double(b[b_rows[row] * test.b_width + j]));
        }
        const size_t place = (static_cast<size_t>(slot) * test.a_width + i) * test.b_width + j;
        expect_near(to_double(out[place]), before[place] + sum.value,
                    sum.fp32_error() + std::abs(before[place]) * 0x1p-23, kOutput == Output::kBf16,
                    at("slot " + std::to_string(slot), i, j));
    }
};

template <class Launch, Output kOutput = Output::kBf16>
void check_gemm(Runner& runner, const std::string& name, const Case& test) {
    check_all_timings(runner, name, [&](Timing timing, uint64_t seed) {
        Gemm<Launch, kOutput> gemm(test, seed);
        gemm.run(timing, seed);
        gemm.check();
    });
}

}  // namespace moetrain::test
