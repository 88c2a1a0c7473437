"""Breaks the kernels of an expert MLP in known ways, one at a time, and requires the emulated tests to notice each."""

from pathlib import Path

import pytest
from emulated_kernels import Mutant, mutant_params, require_caught, source_of

EPILOGUES = "expert_mlp/epilogues.h"
ACTIVATION = "expert_mlp/activation.h"
SUMS = "expert_mlp/sums.h"
FRAGMENT = "grouped_gemm/epilogue.h"

GEMM_MUTANTS = [
    Mutant(
        "up value taken from the neighbouring octet",
        EPILOGUES,
        "gate + kSize / 2;",
        "gate + kSize / 2 - 4;",
        "SwiGLU.*\n *h, up.* expected",
    ),
    Mutant(
        "up half stored over the gate half",
        EPILOGUES,
        "h + row * h_stride + part * hidden,",
        "h + row * h_stride + 0 * part * hidden,",
        "SwiGLU.*\n *h, .*expected",
    ),
    Mutant(
        "H without gaps", EPILOGUES, "h + row * h_stride + part", "h + row * int64_t{hidden} + part", "h, .*expected"
    ),
    Mutant(
        "bias of the other half", EPILOGUES, "bias_of(position, 1, column)", "bias_of(position, 0, column)", "expect"
    ),
    Mutant("bias of the first slot", EPILOGUES, "position.slot * bias_stride", "0 * bias_stride", "bias.*\n.*expected"),
    Mutant(
        "biases without gaps",
        EPILOGUES,
        "position.slot * bias_stride",
        "position.slot * (kNumColumnBlocks * hidden)",
        "bias.*\n.*expected",
    ),
    Mutant(
        "bias of the neighbouring column",
        EPILOGUES,
        "const int column = position.column + 8 * octet + 2 * position.quad_lane;",
        "const int column = position.column + 8 * octet;",
        "bias.*\n.*expected",
    ),
    Mutant(
        "A without the weight of its row",
        EPILOGUES,
        "weight[row] : 0.0f;\n#pragma",
        "1.0f : 0.0f;\n#pragma",
        "a, .*exp",
    ),
    Mutant("weight of another row", EPILOGUES, "is_valid ? weight[row]", "is_valid ? weight[row ^ 1]", "a, .*expected"),
    Mutant(
        "A stored in the first columns",
        EPILOGUES,
        "const int column = position.column + step * kColumnsPerStep;\n                Words activated;",
        "const int column = position.column;\n                Words activated;",
        "a, .*expected",
    ),
    Mutant(
        "rows of the second half taken from the first",
        EPILOGUES,
        "const int row = position.row + 8 * half;\n            const bool",
        "const int row = position.row;\n            const bool",
        "expected",
    ),
    Mutant("H stored though not kept", EPILOGUES, "if (h == nullptr) return;", "", "SIGSEGV|Segmentation|A alone|^ok"),
    Mutant("gate and up exchanged", EPILOGUES, "swiglu(g.low, u.low)", "swiglu(u.low, g.low)", "a, .*expected"),
    Mutant(
        "gradient without the weight",
        EPILOGUES,
        "swiglu_gradient(g.low, u.low, row_weight * da[0])",
        "swiglu_gradient(g.low, u.low, da[0])",
        "dh, gate.*expected",
    ),
    Mutant(
        "dS from the weighted gradient",
        EPILOGUES,
        "product += da[0] * low.activated",
        "product += row_weight * da[0] * low.activated",
        "weight_grad.*expected",
    ),
    Mutant("dS of one lane alone", EPILOGUES, "ptx::sum_over_lanes<4>(product)", "product", "weight_grad.*expected"),
    Mutant(
        "dS of rows that belong to others",
        EPILOGUES,
        "if (is_valid && position.quad_lane == 0)",
        "if (position.quad_lane == 0)",
        "outside the output|expected",
    ),
    Mutant(
        "parts of dS over one another", EPILOGUES, "position.part_idx * num_pairs", "0 * num_pairs", "expected|never"
    ),
    Mutant(
        "up half of H read from the gate half",
        EPILOGUES,
        "load_columns(h_row + hidden,",
        "load_columns(h_row,",
        "dh, .*expected",
    ),
    Mutant(
        "dup stored as dgate",
        EPILOGUES,
        "store_columns(dh_row + hidden,",
        "store_columns(dh_row,",
        "dh, .*expected|got",
    ),
    Mutant("dH with H's gaps", EPILOGUES, "dh + row * dh_stride", "dh + row * h_stride", "expected|outside"),
    Mutant(
        "columns in place of octets, on loading",
        FRAGMENT,
        "words[i] = chunk.word[i];\n    transpose_quad(words, quad_lane);",
        "words[i] = chunk.word[i];",
        "hidden gradient.*\n.*expected",
    ),
    Mutant(
        "a row's last columns not loaded",
        FRAGMENT,
        "ptx::Words4 chunk{};\n    if (is_valid && own_column < num_columns)",
        "ptx::Words4 chunk{};\n    if (is_valid && own_column + 8 < num_columns)",
        "hidden gradient.*\n.*expected",
    ),
    Mutant("slope of SwiGLU without its second term", ACTIVATION, "(s + silu * (1 - s))", "s", "dh, gate.*expected"),
    Mutant("GELU by the other tail", ACTIVATION, "erfcf(-0.70710678f", "erfcf(0.70710678f", "GELU.*\n.*expected"),
    Mutant("slope of GELU without its density", ACTIVATION, "cdf + x * density", "cdf", "dh, gate.*expected"),
    Mutant("slope of ReLU squared halved", ACTIVATION, "2 * positive}", "positive}", "ReLU.*\n.*dh, gate.*expected"),
]

SUM_MUTANTS = [
    Mutant(
        "a row's last pair left out",
        SUMS,
        "if (first + i < end) add_chunk",
        "if (first + i + 1 < end) add_chunk",
        "pair sum",
    ),
    Mutant(
        "pairs of one batch alone",
        SUMS,
        "first < end; first += kPairsInFlight",
        "first < end; first += 4096",
        "pair sum",
    ),
    Mutant(
        "pairs in order of the list's places",
        SUMS,
        "int64_t{arguments.pairs[first + i]}",
        "int64_t{first + i}",
        "pair sum",
    ),
    Mutant(
        "columns beyond the first pass left out",
        SUMS,
        "column < arguments.width;\n             column += kChunkColumns * kPairSumThreads",
        "column < arguments.width;\n             column += arguments.width",
        "wide rows.*\n *pair sum",
    ),
    Mutant(
        "high halves taken for low",
        SUMS,
        "weight * high_half(chunk.word[i])",
        "weight * low_half(chunk.word[i])",
        "sum",
    ),
    Mutant(
        "parts with another's stride",
        SUMS,
        "int64_t{i} * arguments.num_pairs + pair",
        "int64_t{i} * (arguments.num_pairs - 1) + pair",
        "weight gradient.*expected",
    ),
    Mutant(
        "values beyond the last group",
        SUMS,
        "pair < length && i < arguments.num_parts",
        "i < arguments.num_parts",
        "beyond",
    ),
    Mutant(
        "gradient beyond the capacity stored",
        SUMS,
        "if (pair < arguments.num_pairs) arguments.out[pair]",
        "arguments.out[pair]",
        "outside the output",
    ),
    Mutant(
        "every lane takes the last product",
        SUMS,
        "if (i == lane_idx) sum += product;",
        "sum += product;",
        "bias.*\n.*expected",
    ),
    Mutant(
        "group that ends at the pair", SUMS, "group_offsets[middle] <= pair", "group_offsets[middle] < pair", "expected"
    ),
    Mutant(
        "slot of the group not looked up", SUMS, ": arguments.slots[group_idx];", ": group_idx;", "slots.*\n.*expected"
    ),
    Mutant(
        "bias product of row n",
        SUMS,
        "arguments.row_indices[pair] * arguments.dy_stride",
        "0 * arguments.dy_stride",
        "expected",
    ),
    Mutant(
        "rows of one lane alone",
        SUMS,
        "group_offsets[group_idx] + row_lane; row",
        "group_offsets[group_idx]; row",
        "slot sum",
    ),
    Mutant("slots' rows unweighted", SUMS, "1.0f : arguments.weight[row]", "1.0f : 1.0f", "weighted.*\n *slot sum"),
    Mutant(
        "first group of a slot alone",
        SUMS,
        "arguments.slot_offsets[slot + 1] : slot",
        "arguments.slot_offsets[slot] + 1 : slot",
        "slot sum",
    ),
    Mutant(
        "lanes' sums read before they are there",
        SUMS,
        "        ptx::sync_block();\n        if (row_lane == 0",
        "        if (row_lane == 0",
        "slot sum",
    ),
    Mutant(
        "no barrier before shared memory is reused",
        SUMS,
        "        ptx::sync_block();  // shared",
        "        // shared",
        "slot sum",
    ),
    Mutant(
        "columns beyond the width stored",
        SUMS,
        "if (row_lane == 0 && column < arguments.width)",
        "if (row_lane == 0)",
        "outside|slot",
    ),
]

AREA_OF_MUTANT = {
    **{mutant.name: ("expert_mlp_gemms", mutant) for mutant in GEMM_MUTANTS},
    **{mutant.name: ("expert_mlp_sums", mutant) for mutant in SUM_MUTANTS},
}
MUTANTS = [mutant for _, mutant in AREA_OF_MUTANT.values()]


def test_every_mutant_finds_its_text() -> None:
    assert len(MUTANTS) == len(GEMM_MUTANTS) + len(SUM_MUTANTS), "two mutants have one name"
    gone = [mutant.name for mutant in MUTANTS if mutant.old not in source_of(mutant).read_text()]
    assert not gone, f"these mutants name text that is no longer there: {gone}"


@pytest.mark.parametrize("mutant", mutant_params(MUTANTS))
def test_mutant_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    area, _ = AREA_OF_MUTANT[mutant.name]
    require_caught(area, mutant, tmp_path)
