// What the emulation promises to notice of copies, of matrix loads and stores, and of what the async proxy may see.
#include <functional>
#include <string>
#include <vector>

#include "cuda/ptx/cp_async.h"
#include "cuda/ptx/mbarrier.h"
#include "cuda/ptx/shared.h"
#include "cuda/ptx/tma.h"
#include "expect.h"
#include "tensors.h"

namespace moetrain::test {
namespace {

using emulation::Failure;
using emulation::GridOptions;
using emulation::run_grid;
using emulation::Timing;

constexpr Timing kTimings[] = {Timing::kEarly, Timing::kLate, Timing::kRandom};

GridOptions small_grid(int num_threads, Timing timing = Timing::kLate) {
    return {.num_blocks = 1, .num_threads = num_threads, .shared_bytes = 4096, .seed = 7, .timing = timing};
}

void run_one_thread(Timing timing, const std::function<void(uint8_t* shared)>& body) {
    run_grid(small_grid(32, timing), [&] {
        if (ptx::thread_idx() == 0) body(ptx::dynamic_shared_memory());
    });
}

void copy_is_invisible_until_its_barrier() {
    alignas(16) static const uint32_t source[4] = {1, 2, 3, 4};
    for (const Timing timing : {Timing::kEarly, Timing::kLate}) {
        uint32_t before = 0;
        uint32_t after = 0;
        run_grid(small_grid(32, timing), [&] {
            if (ptx::thread_idx() != 0) return;
            auto* target = reinterpret_cast<uint32_t*>(ptx::dynamic_shared_memory());
            auto* barrier = reinterpret_cast<uint64_t*>(target + 4);
            ptx::mbarrier_init(barrier, 1);
            ptx::cp_async_16_bytes(target, source, true);
            ptx::cp_async_arrive(barrier);
            before = target[3];
            ptx::mbarrier_wait(barrier, 0);
            after = target[3];
        });
        expect(before == (timing == Timing::kEarly ? 4u : 0xFFFFFFFFu),
               "value before the wait: " + std::to_string(before));
        expect(after == 4, "value after the wait: " + std::to_string(after));
    }
    expect_throws<Failure>("1 cp.async", [] {
        run_grid(small_grid(32), [] {
            if (ptx::thread_idx() == 0) ptx::cp_async_16_bytes(ptx::dynamic_shared_memory(), source, true);
        });
    });
}

// A group lands at the wait that names it, later ones may stay in flight.
void copy_groups_land_in_order() {
    alignas(16) static const uint32_t source[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    uint32_t second_before = 0;
    uint32_t first = 0;
    uint32_t second = 0;
    run_one_thread(Timing::kLate, [&](uint8_t* shared) {
        ptx::cp_async_16_bytes(shared, source, true);
        ptx::cp_async_commit();
        ptx::cp_async_16_bytes(shared + 16, source + 4, true);
        ptx::cp_async_commit();
        ptx::cp_async_wait<1>();
        first = ptx::load_shared_16_bytes(shared).word[0];
        second_before = reinterpret_cast<uint32_t*>(shared)[4];
        ptx::cp_async_wait<0>();
        second = ptx::load_shared_16_bytes(shared + 16).word[0];
    });
    expect(first == 1 && second_before == 0xFFFFFFFF && second == 5, "groups read as " + std::to_string(first) + ", " +
                                                                         std::to_string(second_before) + ", " +
                                                                         std::to_string(second));
    expect_throws<Failure>("is read while a copy into it is in flight", [&] {
        run_one_thread(Timing::kLate, [](uint8_t* shared) {
            ptx::cp_async_16_bytes(shared, source, true);
            ptx::cp_async_wait<0>();  // nothing was committed
            ptx::load_shared_16_bytes(shared);
        });
    });
}

void copies_stay_inside_the_tensors() {
    Bf16Buffer tensor(16);
    GridOptions options = small_grid(32);
    options.tensors = {tensor.range()};
    expect_throws<Failure>("cp.async touches 16 bytes of global memory outside every tensor", [&] {
        run_grid(options, [&] {
            if (ptx::thread_idx() == 0) ptx::cp_async_16_bytes(ptx::dynamic_shared_memory(), tensor.data() + 16, true);
        });
    });
}

// A tensor of 3 rows of 20 columns, copied in and out by boxes of 4 x 16 that reach beyond it on all sides.
void boxes_keep_to_the_tensor() {
    for (const Swizzle swizzle : {Swizzle::kNone, Swizzle::k32}) {
        for (const Timing timing : kTimings) {
            Bf16Buffer in(3 * 24);
            Bf16Buffer out(3 * 24);
            for (uint16_t i = 0; i < in.size(); ++i)
                in[i].bits = i;
            out.fill(kUntouched);
            const auto map_of = [swizzle](Bf16Buffer& data) {
                return ptx::make_tensor_map({.data = data.data(),
                                             .num_rows = 3,
                                             .num_columns = 20,
                                             .row_stride = 24,
                                             .box_rows = 4,
                                             .box_columns = 16,
                                             .swizzle = swizzle});
            };
            const ptx::TensorMap in_map = map_of(in);
            const ptx::TensorMap out_map = map_of(out);
            uint32_t beyond = 1;
            run_one_thread(timing, [&](uint8_t* shared) {
                auto* barrier = reinterpret_cast<uint64_t*>(shared + 1024);
                ptx::mbarrier_init(barrier, 1);
                ptx::fence_mbarrier_init();
                ptx::mbarrier_arrive_expect_bytes(barrier, 2 * 128);
                ptx::tma_load(shared, &in_map, barrier, 0, -1, -4);
                ptx::tma_load(shared + 128, &in_map, barrier, 0, 1, 12);
                ptx::mbarrier_wait(barrier, 0);
                beyond = ptx::load_shared_16_bytes(shared).word[0];  // row -1
                ptx::tma_store(&out_map, shared, 0, -1, -4);
                ptx::tma_store(&out_map, shared + 128, 0, 1, 12);
                ptx::bulk_commit();
                ptx::bulk_wait<0>();
            });
            expect(beyond == 0, "a row before the tensor reads as " + std::to_string(beyond));
            for (int row = 0; row < 3; ++row)
                for (int column = 0; column < 24; ++column) {
                    const bool is_copied = column < 12 || (row >= 1 && column < 20);
                    const int expected = is_copied ? 24 * row + column : int{kUntouched};
                    expect(out[24 * row + column].bits == expected, "row " + std::to_string(row) + ", column " +
                                                                        std::to_string(column) + ": " +
                                                                        std::to_string(out[24 * row + column].bits));
                }
        }
    }
}

void rows_travel_without_a_tensor_map() {
    for (const Timing timing : kTimings) {
        Bf16Buffer in(64);
        Bf16Buffer out(64);
        for (uint16_t i = 0; i < 64; ++i)
            in[i].bits = i;
        out.fill(kUntouched);
        run_one_thread(timing, [&](uint8_t* shared) {
            auto* barrier = reinterpret_cast<uint64_t*>(shared + 1024);
            ptx::mbarrier_init(barrier, 1);
            ptx::fence_mbarrier_init();
            ptx::mbarrier_expect_bytes(barrier, 128);
            ptx::mbarrier_arrive(barrier);
            ptx::bulk_load(shared, in.data(), 128, barrier);
            ptx::mbarrier_wait(barrier, 0);
            ptx::bulk_store(out.data() + 8, shared, 96);
            ptx::bulk_commit();
            ptx::bulk_wait_read<0>();
        });
        for (int i = 0; i < 64; ++i)
            expect(out[i].bits == (i >= 8 && i < 56 ? i - 8 : int{kUntouched}),
                   "element " + std::to_string(i) + ": " + std::to_string(out[i].bits));
    }
}

// Runs `body` before a store of one row from shared memory, and `after` behind its commit.
void store_one_row(const std::function<void(uint8_t*)>& body, const std::function<void(uint8_t*)>& after) {
    Bf16Buffer out(8);
    run_one_thread(Timing::kLate, [&](uint8_t* shared) {
        body(shared);
        ptx::bulk_store(out.data(), shared, 16);
        ptx::bulk_commit();
        after(shared);
    });
}

void stores_see_what_was_fenced() {
    const auto write = [](uint8_t* shared) { ptx::store_shared_16_bytes(shared, {{1, 2, 3, 4}}); };
    const auto write_and_fence = [&](uint8_t* shared) {
        write(shared);
        ptx::fence_async_proxy();
    };
    const auto wait = [](uint8_t*) { ptx::bulk_wait_read<0>(); };
    store_one_row(write_and_fence, wait);
    expect_throws<Failure>(
        "proxy: a TMA store reads shared address 0x400, written through the generic proxy by thread 0",
        [&] { store_one_row(write, wait); });
    expect_throws<Failure>("without fence_async_proxy", [&] {
        store_one_row(
            [](uint8_t* shared) {
                ptx::fence_async_proxy();
                ptx::store_shared_4_bytes(shared + 4, 1);
            },
            wait);
    });
    expect_throws<Failure>("written by a plain store",
                           [&] { store_one_row([](uint8_t* shared) { shared[3] = 1; }, wait); });
    expect_throws<Failure>("is written while a TMA store has yet to read it",
                           [&] { store_one_row(write_and_fence, [&](uint8_t* shared) { write(shared); }); });
    expect_throws<Failure>("1 stores from shared memory", [&] { store_one_row(write_and_fence, [](uint8_t*) {}); });
}

// Four matrices whose element (row, column) of matrix m is 64 m + 8 row + column.
template <bool kTranspose>
void check_matrices() {
    std::vector<uint32_t> loaded(4 * 32);
    std::vector<uint16_t> stored(4 * 64);
    run_grid(small_grid(32), [&] {
        const int lane = ptx::thread_idx();
        auto* elements = reinterpret_cast<uint16_t*>(ptx::dynamic_shared_memory());
        for (int i = 0; i < 8; ++i)
            elements[8 * lane + i] = static_cast<uint16_t>(8 * lane + i);
        ptx::sync_warp();
        uint32_t words[4];
        ptx::ldmatrix_x4<kTranspose>(words, elements + 8 * lane);
        ptx::stmatrix_x4<kTranspose>(elements + 256 + 8 * lane, words);
        ptx::sync_warp();
        for (int m = 0; m < 4; ++m)
            loaded[32 * m + lane] = words[m];
        for (int i = 0; i < 8; ++i)
            stored[8 * lane + i] = elements[256 + 8 * lane + i];
    });
    for (int m = 0; m < 4; ++m)
        for (int lane = 0; lane < 32; ++lane) {
            const int first = kTranspose ? 64 * m + 8 * (lane % 4 * 2) + lane / 4 : 64 * m + lane * 2;
            const int second = first + (kTranspose ? 8 : 1);
            expect(loaded[32 * m + lane] == static_cast<uint32_t>(first | second << 16),
                   "matrix " + std::to_string(m) + ", lane " + std::to_string(lane) + " loads " +
                       emulation::hex(loaded[32 * m + lane]));
        }
    for (int i = 0; i < 256; ++i)
        expect(stored[i] == i, "element " + std::to_string(i) + " is stored as " + std::to_string(stored[i]));
}

void matrices_are_laid_out_as_stated() {
    check_matrices<false>();
    check_matrices<true>();
    expect_throws<Failure>("must be multiples of 16", [] {
        run_grid(small_grid(32), [] {
            uint32_t words[4];
            ptx::ldmatrix_x4(words, ptx::dynamic_shared_memory() + 8 * ptx::thread_idx());
        });
    });
}

void matrices_lie_in_different_banks() {
    const auto load_rows_apart = [](int num_bytes) {
        run_grid(small_grid(32), [num_bytes] {
            uint32_t words[4];
            ptx::ldmatrix_x4(words, ptx::dynamic_shared_memory() + num_bytes * ptx::thread_idx());
        });
    };
    load_rows_apart(48);
    load_rows_apart(0);  // one row for all
    expect_throws<Failure>("bank conflict: ldmatrix reads rows at 0x400 and 0x480", [&] { load_rows_apart(32); });
}

void tensor_maps_are_checked() {
    Bf16Buffer tensor(256);
    TensorSpec spec{.data = tensor.data(), .num_rows = 4, .num_columns = 64, .box_rows = 4, .box_columns = 32};
    expect_throws<std::invalid_argument>("must have the 128 bytes of its swizzle, got 64",
                                         [&] { ptx::make_tensor_map(spec); });
    spec.swizzle = Swizzle::k64;
    ptx::make_tensor_map(spec);
    spec.row_stride = 65;
    expect_throws<std::invalid_argument>("multiples of 16 bytes", [&] { ptx::make_tensor_map(spec); });
    spec.row_stride = 64;
    spec.box_rows = 257;
    expect_throws<std::invalid_argument>("1 to 256 rows", [&] { ptx::make_tensor_map(spec); });
    const ptx::TensorMap not_encoded{};
    expect_throws<Failure>("tensor map that was not encoded", [&] {
        run_one_thread(Timing::kLate, [&](uint8_t* shared) { ptx::tma_store(&not_encoded, shared, 0, 0, 0); });
    });
}

}  // namespace
}  // namespace moetrain::test

int main() {
    using namespace moetrain::test;
    Runner runner;
    runner.run("copy is invisible until its barrier", copy_is_invisible_until_its_barrier);
    runner.run("copy groups land in order", copy_groups_land_in_order);
    runner.run("copies stay inside the tensors", copies_stay_inside_the_tensors);
    runner.run("boxes keep to the tensor", boxes_keep_to_the_tensor);
    runner.run("rows travel without a tensor map", rows_travel_without_a_tensor_map);
    runner.run("stores see what was fenced", stores_see_what_was_fenced);
    runner.run("matrices are laid out as stated", matrices_are_laid_out_as_stated);
    runner.run("matrices lie in different banks", matrices_lie_in_different_banks);
    runner.run("tensor maps are checked", tensor_maps_are_checked);
    return runner.exit_code();
}
