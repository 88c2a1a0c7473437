// Chunks copied and summed by tables, as in chunks.cu, against loops over single elements.
//
// Kernel: chunks/chunks.cu
#include <cuda_bf16.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "cuda/chunks/chunks.h"
#include "cuda_runtime.h"
#include "expect.h"

namespace moetrain::test {
namespace {

using Random = std::mt19937_64;

constexpr float kGuard = -77;  // exact in every type

template <class T>
constexpr Element kElement = Element::kFloat;
template <>
constexpr Element kElement<__nv_bfloat16> = Element::kBFloat16;
template <>
constexpr Element kElement<double> = Element::kDouble;

// Offsets in elements, counted from the tensor's first one.
struct Copy {
    int64_t from, to, length;
};
struct Term {
    int64_t source, from, to, length;
};

// Storage whose first element stands on a 16-byte boundary.
template <class T>
struct Aligned {
    explicit Aligned(size_t size) : storage(size + 16), size(size) {
        const auto address = reinterpret_cast<uintptr_t>(storage.data());
        data = storage.data() + (16 - address % 16) % 16 / sizeof(T);
    }
    Aligned(Aligned&&) noexcept = default;  // a copy's data would be the original's
    std::vector<T> storage;
    size_t size;
    T* data;
};

template <class T>
Aligned<T> random_values(Random& random, size_t size) {
    std::uniform_real_distribution<float> uniform(-1, 1);
    Aligned<T> values(size);
    for (size_t i = 0; i < size; ++i)
        values.data[i] = static_cast<T>(uniform(random));
    return values;
}

template <class T>
Aligned<T> guards(size_t size) {
    Aligned<T> values(size);
    for (size_t i = 0; i < size; ++i)
        values.data[i] = static_cast<T>(kGuard);
    return values;
}

template <class T>
void expect_same(const Aligned<T>& actual, const std::vector<T>& expected, const std::string& what) {
    for (size_t i = 0; i < expected.size(); ++i) {
        const auto a = static_cast<double>(static_cast<float>(actual.data[i]));
        const auto b = static_cast<double>(static_cast<float>(expected[i]));
        expect(a == b,
               what + "[" + std::to_string(i) + "]: expected " + std::to_string(b) + ", got " + std::to_string(a));
    }
}

// Aligned and not, both shifted alike, shifted apart, shorter than a vector, of no elements, of several blocks.
template <class From, class To>
void copy_chunks(Random& random, const std::string& what) {
    const std::vector<Copy> table{{0, 0, 4500},   {4504, 4504, 3}, {4600, 4700, 100}, {13, 4525, 61},
                                  {7, 4650, 45},  {4321, 4601, 0}, {1, 4801, 33},     {4702, 4900, 1},
                                  {16, 4912, 16}, {4690, 4941, 10}};
    const auto source = random_values<From>(random, 4703);
    auto target = guards<To>(5000);
    std::vector<To> expected(5000, static_cast<To>(kGuard));
    for (const auto& [from, to, length] : table)
        for (int64_t i = 0; i < length; ++i)
            expected[to + i] = static_cast<To>(static_cast<float>(source.data[from + i]));
    const auto status =
        launch_copy_chunks(source.data, kElement<From>, &table[0].from, static_cast<int64_t>(table.size()), target.data,
                           kElement<To>, 5000, nullptr);
    expect(status == cudaSuccess, "launch_copy_chunks failed");
    expect_same(target, expected, what);
}

template <class From, class To, class Acc>
void sum_chunks(Random& random, const std::string& what) {
    const std::vector<Term> table{{0, 0, 0, 2100},     {1, 8, 0, 2100},     {2, 16, 0, 2100},    {1, 3, 2107, 50},
                                  {2, 19, 2107, 50},   {0, 5, 2107, 50},    {1, 0, 2200, 70},    {0, 5, 2200, 70},
                                  {2, 11, 2200, 70},   {0, 9, 2170, 0},     {2, 2119, 2170, 1},  {1, 2119, 2170, 1},
                                  {0, 1000, 2304, 40}, {0, 1000, 2304, 40}, {1, 1000, 2304, 40}, {2, 40, 2350, 9}};
    std::vector<Aligned<From>> sources;
    for (int s = 0; s < 3; ++s)
        sources.push_back(random_values<From>(random, 2120));
    ChunkSources data{};
    for (size_t s = 0; s < sources.size(); ++s)
        data.data[s] = sources[s].data;
    auto target = guards<To>(2400);
    std::vector<To> expected(2400, static_cast<To>(kGuard));
    for (size_t first = 0, end = 0; first < table.size(); first = end) {
        const Term& head = table[first];
        for (end = first; end < table.size() && table[end].to == head.to && table[end].length == head.length;)
            ++end;
        for (int64_t i = 0; i < head.length; ++i) {
            const auto term = [&](size_t n) {
                return static_cast<Acc>(sources[table[n].source].data[table[n].from + i]);
            };
            Acc sum = term(first);
            for (size_t n = first + 1; n < end; ++n)
                sum += term(n);
            expected[head.to + i] = static_cast<To>(sum);
        }
    }
    const auto status = launch_sum_chunks(data, kElement<From>, &table[0].source, static_cast<int64_t>(table.size()),
                                          target.data, kElement<To>, 2400, nullptr);
    expect(status == cudaSuccess, "launch_sum_chunks failed");
    expect_same(target, expected, what);
}

void copies(Random& random) {
    copy_chunks<float, float>(random, "float to float");
    copy_chunks<float, __nv_bfloat16>(random, "float to bf16");
    copy_chunks<__nv_bfloat16, float>(random, "bf16 to float");
    copy_chunks<__nv_bfloat16, __nv_bfloat16>(random, "bf16 to bf16");
    copy_chunks<double, __nv_bfloat16>(random, "double to bf16");
    copy_chunks<double, double>(random, "double to double");
}

void sums(Random& random) {
    sum_chunks<float, float, float>(random, "sum of floats");
    sum_chunks<__nv_bfloat16, __nv_bfloat16, float>(random, "sum of bf16");
    sum_chunks<float, __nv_bfloat16, float>(random, "sum of floats to bf16");
    sum_chunks<__nv_bfloat16, float, float>(random, "sum of bf16 to float");
    sum_chunks<float, double, double>(random, "sum of floats to double");
}

// 2^24 + 1 - 2^24 is 0 in this order and 1 in others.
void sums_in_order(Random&) {
    for (const auto& [order, total] : {std::pair{std::vector<int64_t>{0, 1, 2}, 0.0f}, {{0, 2, 1}, 1.0f}}) {
        std::vector<Aligned<float>> sources;
        ChunkSources data{};
        for (const float value : {0x1p24f, 1.0f, -0x1p24f}) {
            Aligned<float> source(21);
            for (size_t i = 0; i < source.size; ++i)
                source.data[i] = value;
            data.data[sources.size()] = source.data;
            sources.push_back(std::move(source));
        }
        std::vector<Term> table;
        for (const int64_t which : order)
            table.push_back({which, 0, 4, 21});
        auto target = guards<float>(30);
        launch_sum_chunks(data, Element::kFloat, &table[0].source, 3, target.data, Element::kFloat, 30, nullptr);
        std::vector<float> expected(30, kGuard);
        std::fill_n(expected.begin() + 4, 21, total);
        expect_same(target, expected, "sum in order");
    }
}

// More rows than the grid has: each block takes several.
void many_rows(Random&) {
    constexpr int64_t kNumRows = 65535 + 300;
    std::vector<Copy> table(kNumRows, {0, 0, 0});
    for (int64_t n = kNumRows - 4; n < kNumRows; ++n)
        table[n] = {n - (kNumRows - 4), 2 * (n - (kNumRows - 4)), 1};
    Aligned<float> source(4);
    for (int i = 0; i < 4; ++i)
        source.data[i] = static_cast<float>(i + 1);
    auto target = guards<float>(8);
    launch_copy_chunks(source.data, Element::kFloat, &table[0].from, kNumRows, target.data, Element::kFloat, 8,
                       nullptr);
    expect_same(target, {1, kGuard, 2, kGuard, 3, kGuard, 4, kGuard}, "last rows");
}

}  // namespace
}  // namespace moetrain::test

int main() {
    using namespace moetrain::test;
    Runner runner;
    const auto with_seeds = [&runner](const std::string& name, void (*check)(Random&), int num_seeds) {
        for (int seed = 1; seed <= num_seeds; ++seed)
            runner.run(name + ", seed " + std::to_string(seed), [&] {
                moetrain::emulation::launch_settings.seed = 100 * static_cast<uint64_t>(seed);
                Random random(static_cast<uint64_t>(seed));
                check(random);
            });
    };
    with_seeds("copies", copies, 3);
    with_seeds("sums", sums, 3);
    with_seeds("sums in order", sums_in_order, 1);
    with_seeds("many rows", many_rows, 1);
    return runner.exit_code();
}
