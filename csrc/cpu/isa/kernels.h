// Compiles the tasks of expert_mlp and causal_attention for the target that the including file's pragma names, and that
// it repeats in kInstructions.
// Everything lands in that file's anonymous namespace, so that the linker cannot mix the versions.
using mlp::Activation;
using mlp::kColumnsPerTask;
using mlp::kPairsPerBlock;
using mlp::kPanel;
using mlp::kRowsPerTask;
using mlp::kSlackRows;
using mlp::Matrix;
using mlp::Problem;
using mlp::round_up;

#include "cpu/tiles/numbers.h"
#include "cpu/tiles/scratch.h"
#include "cpu/tiles/tiles.h"
//
#include "cpu/expert_mlp/forward.h"
//
#include "cpu/attention/rows.h"
//
#include "cpu/attention/operands.h"
//
#include "cpu/attention/tasks.h"
#include "cpu/expert_mlp/backward.h"

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

// What a table's functions are compiled for: the including file's word, except that AMX is its tile's to say.
template <typename Tile>
constexpr const char* compiled_for() {
    if constexpr (requires { Tile::kInstructions; }) {
        return Tile::kInstructions;
    } else {
        return kInstructions;
    }
}

// Wide tiles have 64 columns, narrow ones 32.
template <typename P, typename Wide, typename Narrow, typename Rows = AttentionRows<P>>
constexpr Kernels kernels_of() {
    using M = Tasks<P, Wide>;
    using A = AttentionTasks<P, Wide, Narrow, Rows>;
    return {.mlp = {.scratch_bytes = M::scratch_bytes,
                    .up = M::up,
                    .down = M::down,
                    .input_grad = M::input_grad,
                    .hidden_grad = M::hidden_grad,
                    .w_in_grad = M::w_in_grad,
                    .w_out_grad = M::w_out_grad},
            .attention = {.scratch_bytes = A::scratch_bytes, .forward = A::forward, .backward = A::backward},
            .spin = spin<P, Wide>,
            .compiled_for = compiled_for<Wide>()};
}
