// Compiles the tasks of expert_mlp for the target that the including file's pragma names. Everything lands in that
// file's anonymous namespace, so that the linker cannot mix the versions.
#include "numbers.h"
#include "scratch.h"
#include "tiles.h"
//
#include "forward.h"
//
#include "backward.h"

template <typename P, typename Tile>
int64_t spin(int64_t repeats) {
    using Unit = typename P::Unit;
    constexpr int64_t kUnits = 64;
    alignas(64) Unit panel[kUnits * kPanel] = {};
    alignas(64) Unit a[Tile::kRows * kUnits] = {};
    alignas(64) typename P::Acc c[Tile::kRows * kPanel] = {};
    const Unit* rows[Tile::kRows];
    for (int64_t i = 0; i < Tile::kRows; ++i)
        rows[i] = a + i * kUnits;
    [[maybe_unused]] const typename Tile::Session session;
    for (int64_t i = 0; i < repeats; ++i) {
        Tile::multiply(rows, Tile::kRows, Tile::kRows, kUnits, panel, c);
        asm volatile("" ::"r"(c) : "memory");  // the next product is another one, for all the compiler knows
    }
    return 2 * repeats * Tile::kRows * kPanel * kUnits * P::kPack;
}

template <typename P, typename Tile>
constexpr Kernels kernels_of() {
    using T = Tasks<P, Tile>;
    return {.scratch_bytes = T::scratch_bytes,
            .spin = spin<P, Tile>,
            .up = T::up,
            .down = T::down,
            .input_grad = T::input_grad,
            .hidden_grad = T::hidden_grad,
            .w_in_grad = T::w_in_grad,
            .w_out_grad = T::w_out_grad};
}
