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
constexpr Kernels kernels_of() {
    using T = Tasks<P, Tile>;
    return {.scratch_bytes = T::scratch_bytes,
            .up = T::up,
            .down = T::down,
            .input_grad = T::input_grad,
            .hidden_grad = T::hidden_grad,
            .w_in_grad = T::w_in_grad,
            .w_out_grad = T::w_out_grad};
}
