// The tile scheduler, the checks of arguments, and what the emulation promises to notice.
#include <numeric>
#include <set>
#include <tuple>
#include <vector>

#include "cuda/grouped_gemm/sm90/arguments.h"
#include "cuda/ptx/warp.h"
#include "expect.h"

namespace moetrain::test {
namespace {

using emulation::Failure;
using emulation::GridOptions;
using emulation::run_grid;
using emulation::Timing;
using namespace moetrain::sm90;

GridOptions small_grid(int num_threads, Timing timing = Timing::kLate) {
    return {.num_blocks = 1, .num_threads = num_threads, .shared_bytes = 4096, .seed = 7, .timing = timing};
}

void scheduler_deals_every_tile_once() {
    constexpr int kTileM = 64;
    const std::vector<int32_t> offsets{0, 0, 1, 65, 65, 200, 200};
    const int num_groups = static_cast<int>(offsets.size()) - 1;
    for (const int num_blocks : {1, 3, 50}) {
        using Key = std::tuple<int, int, int, int>;
        std::multiset<Key> dealt;
        std::multiset<Key> expected;
        for (int block_idx = 0; block_idx < num_blocks; ++block_idx) {
            TileScheduler<kTileM> scheduler(offsets.data(), num_groups, 3, block_idx, num_blocks);
            for (Tile tile; scheduler.next(tile);)
                dealt.insert({tile.group_idx, tile.row_begin, tile.row_end, tile.n_tile_idx});
        }
        for (int group_idx = 0; group_idx < num_groups; ++group_idx)
            for (int row = offsets[group_idx]; row < offsets[group_idx + 1]; row += kTileM)
                for (int n_tile_idx = 0; n_tile_idx < 3; ++n_tile_idx)
                    expected.insert({group_idx, row, offsets[group_idx + 1], n_tile_idx});
        expect(dealt == expected,
               "tiles dealt to " + std::to_string(num_blocks) + " blocks are not those of the problem");
    }
}

void named_barrier_orders_two_warps() {
    for (uint64_t seed = 0; seed < 20; ++seed) {
        GridOptions options = small_grid(96);
        options.seed = seed;
        int sum = 0;
        run_grid(options, [&] {
            int* values = reinterpret_cast<int*>(ptx::dynamic_shared_memory());
            const int thread_idx = ptx::thread_idx();
            if (thread_idx >= 64) return;  // the third warp takes no part
            values[thread_idx] = thread_idx;
            ptx::sync_named_barrier(3, 64);
            if (thread_idx == 0) sum = std::accumulate(values, values + 64, 0);
        });
        expect(sum == 64 * 63 / 2,
               "a value was read before its warp had passed the barrier: sum " + std::to_string(sum));
    }
}

void missing_barrier_shows_poison() {
    bool has_seen_poison = false;
    for (uint64_t seed = 0; seed < 20; ++seed) {
        GridOptions options = small_grid(64);
        options.seed = seed;
        run_grid(options, [&] {
            int* values = reinterpret_cast<int*>(ptx::dynamic_shared_memory());
            values[ptx::thread_idx()] = ptx::thread_idx();
            if (ptx::thread_idx() == 0 && values[63] == -1) has_seen_poison = true;
        });
    }
    expect(has_seen_poison, "warp 0 never ran before warp 1 in 20 seeds");
}

void deadlock_names_waiters() {
    expect_throws<Failure>("to complete the phase of parity 0 (its phase is 0, with 1 of 2 arrivals", [] {
        run_grid(small_grid(32), [] {
            auto* barrier = reinterpret_cast<uint64_t*>(ptx::dynamic_shared_memory());
            if (ptx::thread_idx() == 0) {
                ptx::mbarrier_init(barrier, 2);
                ptx::fence_mbarrier_init();
            }
            ptx::sync_block();
            if (ptx::thread_idx() == 0) ptx::mbarrier_arrive(barrier);
            ptx::mbarrier_wait(barrier, 0);
        });
    });
    expect_throws<Failure>("32 threads, from 0 to 31, wait for named barrier 0 (32 of 64 threads are there)", [] {
        run_grid(small_grid(64), [] {
            if (ptx::thread_idx() < 32) ptx::sync_block();
        });
    });
}

void misuse_of_mbarrier_is_noticed() {
    const auto run = [](const std::function<void(uint64_t*)>& body) {
        run_grid(small_grid(32), [&] {
            if (ptx::thread_idx() == 0) body(reinterpret_cast<uint64_t*>(ptx::dynamic_shared_memory()));
        });
    };
    expect_throws<Failure>("used before mbarrier_init", [&] { run([](uint64_t* b) { ptx::mbarrier_arrive(b); }); });
    expect_throws<Failure>("more than the 1 arrivals", [&] {
        run([](uint64_t* b) {
            ptx::mbarrier_init(b, 1);
            ptx::mbarrier_arrive_expect_bytes(b, 128);
            ptx::mbarrier_arrive(b);
        });
    });
}

void arrival_alone_opens_a_named_barrier() {
    for (uint64_t seed = 0; seed < 20; ++seed) {
        GridOptions options = small_grid(64);
        options.seed = seed;
        int seen = 0;
        run_grid(options, [&] {
            int* values = reinterpret_cast<int*>(ptx::dynamic_shared_memory());
            if (ptx::thread_idx() < 32) {
                values[ptx::thread_idx()] = 1;
                ptx::arrive_named_barrier(2, 64);
            } else {
                ptx::sync_named_barrier(2, 64);
                if (ptx::thread_idx() == 32) seen = std::accumulate(values, values + 32, 0);
            }
        });
        expect(seen == 32, "values stored before the arrival, seen after the barrier: " + std::to_string(seen));
    }
}

void a_barrier_left_half_full_is_noticed() {
    expect_throws<Failure>("named barrier 2 is left with 32 of 64 arrivals", [] {
        run_grid(small_grid(64), [] {
            if (ptx::thread_idx() < 32) ptx::arrive_named_barrier(2, 64);
        });
    });
}

void lanes_of_a_warp_meet() {
    for (uint64_t seed = 0; seed < 5; ++seed) {
        GridOptions options = small_grid(64);
        options.seed = seed;
        std::vector<int> crossed(64), third(64);
        std::vector<uint32_t> odd(64);
        std::vector<float> sums(64);
        run_grid(options, [&] {
            const int i = ptx::thread_idx();
            crossed[i] = ptx::shuffle_xor(i, 5);
            third[i] = ptx::shuffle(10 * i, 3);
            odd[i] = ptx::lanes_where(i % 2 == 1);
            sums[i] = ptx::sum_over_lanes<4>(static_cast<float>(i));
        });
        for (int i = 0; i < 64; ++i)
            expect(crossed[i] == (i ^ 5) && third[i] == 10 * (i / 32 * 32 + 3) && odd[i] == 0xAAAAAAAA &&
                       sums[i] == static_cast<float>(4 * (i / 4 * 4) + 6),
                   "thread " + std::to_string(i) + " got " + std::to_string(crossed[i]) + ", " +
                       std::to_string(third[i]) + ", " + std::to_string(odd[i]) + ", " + std::to_string(sums[i]));
    }
}

void lanes_that_miss_each_other_are_noticed() {
    expect_throws<Failure>("lanes of warp 0 meet in", [] {
        run_grid(small_grid(32), [] {
            if (ptx::thread_idx() == 7)
                ptx::sync_warp();
            else
                ptx::shuffle(1, 0);
        });
    });
    expect_throws<Failure>("wait for shuffle of warp 0 (lanes 0xffffff7f of 0xffffffff are there)", [] {
        run_grid(small_grid(32), [] {
            if (ptx::thread_idx() != 7) ptx::shuffle(1, 0);
        });
    });
}

void registers_come_from_a_pool() {
    const auto run = [](bool shrinks) {
        run_grid(small_grid(384), [shrinks] {
            if (ptx::thread_idx() >= 128)
                ptx::grow_registers<232>();
            else if (shrinks)
                ptx::shrink_registers<40>();
        });
    };
    run(true);
    expect_throws<Failure>("wait for 232 registers each", [&] { run(false); });
}

}  // namespace
}  // namespace moetrain::test

int main() {
    using namespace moetrain::test;
    Runner runner;
    runner.run("scheduler deals every tile once", scheduler_deals_every_tile_once);
    runner.run("named barrier orders two warps", named_barrier_orders_two_warps);
    runner.run("missing barrier shows poison", missing_barrier_shows_poison);
    runner.run("deadlock names waiters", deadlock_names_waiters);
    runner.run("misuse of mbarrier is noticed", misuse_of_mbarrier_is_noticed);
    runner.run("arrival alone opens a named barrier", arrival_alone_opens_a_named_barrier);
    runner.run("a barrier left half full is noticed", a_barrier_left_half_full_is_noticed);
    runner.run("lanes of a warp meet", lanes_of_a_warp_meet);
    runner.run("lanes that miss each other are noticed", lanes_that_miss_each_other_are_noticed);
    runner.run("registers come from a pool", registers_come_from_a_pool);
    return runner.exit_code();
}
