// The AMX source on emulated tile registers, in bf16, for tests on any machine; other dtypes are the portable ones.
#include "cpu/isa/isa.h"

namespace moetrain::isa {
namespace {
constexpr const char* kInstructions = "portable";
#include "cpu/isa/kernels.h"
// Tiles of this file, in terms of the above.
#include "cpu/tiles/tile_amx.h"

}  // namespace

Kernels amx_emulated_kernels(Dtype dtype) {
    if (dtype != Dtype::kBf16) return portable_kernels(dtype);
    return kernels_of<Bf16Pairs, AmxTile<EmulatedAmx, Untransposing>, AmxTile<EmulatedAmx, Untransposing, 32>>();
}

}  // namespace moetrain::isa
