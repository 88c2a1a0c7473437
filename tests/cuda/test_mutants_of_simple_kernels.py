"""Breaks the simple kernels, one way at a time, and requires the emulated test to notice each."""

from pathlib import Path

import pytest
from emulated_kernels import Mutant, mutant_params, require_caught, source_of

GATHER = "rows/gather_rows.cu"
GROUP = "routing/group_pairs.cu"
SCATTER = "rows/scatter_add_rows.cu"
SELECT = "routing/select_experts.cu"
SELECT_ROW = "routing/select_experts_row.cuh"
GEMM = "grouped_gemm/simple/grouped_gemm.cu"
VARLEN_K = "grouped_gemm/simple/grouped_gemm_varlen_k.cu"

MUTANTS = [
    Mutant(
        "gather beyond the list's length", GATHER, "length == nullptr ? num_rows : *length", "num_rows", "y of width"
    ),
    Mutant(
        "scan reads a neighbour that has moved on",
        GROUP,
        """        const int32_t before = i >= step ? shared[i - step] : 0;
        __syncthreads();
""",
        """        const int32_t before = i >= step ? shared[i - step] : 0;
""",
        r"(pair|offset)\[|ended by signal",
    ),
    Mutant(
        "scan goes on before all have added",
        GROUP,
        """        shared[i] += before;
        __syncthreads();
""",
        """        shared[i] += before;
""",
        r"(pair|offset)\[|ended by signal",
    ),
    Mutant(
        "scan's scratch used again too soon",
        GROUP,
        """    const int32_t exclusive = shared[i] - x;
    __syncthreads();
""",
        """    const int32_t exclusive = shared[i] - x;
""",
        r"(pair|offset)\[|ended by signal",
    ),
    Mutant(
        "places taken while peers still read them",
        GROUP,
        """write(next[bucket] + rank, i);
        __syncwarp();
        if (inside && rank == 0)""",
        """write(next[bucket] + rank, i);
        if (inside && rank == 0)""",
        r"pair\[|ended by signal",
    ),
    Mutant("rank counts the lane itself", GROUP, "((1U << lane) - 1)", "((2U << lane) - 1)", r"pair\[|ended by signal"),
    Mutant(
        "counters added to before they are zero",
        GROUP,
        """        counter[b] = 0;
    __syncwarp();
""",
        """        counter[b] = 0;
""",
        r"(pair|offset)\[|ended by signal",
    ),
    Mutant(
        "sums of warps overwritten too soon",
        SCATTER,
        "        __syncthreads();  // warp_sum is about to be overwritten\n",
        "",
        r"x\[|ended by signal",  # wrong places to write to: where they are, the heap says
    ),
    Mutant(
        "pairs left in the order they came",
        SCATTER,
        "ordered[segment_begin + rank] = pair;",
        "ordered[i] = pair;",
        "in order",
    ),
    Mutant("weights forgotten", SCATTER, "weight == nullptr ? value : weight[pair] * value", "value", r"x\["),
    Mutant("tie goes to the higher id", SELECT_ROW, "key[e] > most ||", "key[e] >= most ||", r"expert_id\["),
    Mutant(
        "next key sought before the last is marked",
        SELECT_ROW,
        """    if (lane == 0) key[place] = taken;
    __syncwarp();
""",
        """    if (lane == 0) key[place] = taken;
""",
        r"expert_id\[",
    ),
    Mutant(
        "a row's sum read before all strides are there",
        SELECT,
        """        shared[threadIdx.y][threadIdx.x] = sum;
        __syncthreads();
""",
        """        shared[threadIdx.y][threadIdx.x] = sum;
""",
        r"prob_sum\[",
    ),
    Mutant(
        "one stride of tokens left out",
        SELECT,
        "for (int r = 1; r < kSumRows; ++r)",
        "for (int r = 2; r < kSumRows; ++r)",
        r"prob_sum\[",
    ),
    Mutant(
        "operands overwritten while others multiply",
        GEMM,
        "        __syncthreads();  // the operands are about to be overwritten\n",
        "",
        r"c\[",
    ),
    Mutant(
        "every tile of a group is its first",
        GEMM,
        "__shfl_sync(kWholeWarp, tile_begin, source)",
        "__shfl_sync(kWholeWarp, begin, source)",
        r"c\[",
    ),
    Mutant(
        "operands of varlen-K overwritten while others multiply",
        VARLEN_K,
        "            __syncthreads();  // the operands are about to be overwritten\n",
        "",
        r"out\[",
    ),
    Mutant("another group's slot", GEMM, "args.slot[tile.group]", "tile.group", r"c\["),
    Mutant(
        "tile found before it is shared",
        GEMM,
        "    __syncthreads();\n    const RowTile tile",
        "    const RowTile tile",
        r"c\[|deadlock",
    ),
    Mutant(
        "rows of x without gaps", GATHER, "row[i] * x_stride_bytes", "row[i] * vecs_per_row * sizeof(Vec)", "y of width"
    ),
    Mutant("gather takes one step", GATHER, "i += gridDim.x", "i = end", "y of width"),
    Mutant("gather steps too far", GATHER, "i += gridDim.x", "i += blockDim.x", "y of width"),
    Mutant("rows of y without gaps", SCATTER, "pair * y_stride + d", "pair * width + d", r"x\["),
    Mutant("a row's sum takes one step", SCATTER, "t += gridDim.x", "t = num_rows", r"x\["),
    Mutant(
        "pairs take one step",
        SCATTER,
        "return gridDim.x * static_cast<int64_t>(blockDim.x)",
        "return INT32_MAX",
        r"x\[|ended by signal",
    ),
    Mutant("rows of a without gaps", GEMM, "row[i] * args.a_stride", "row[i] * args.inner", r"c\["),
    Mutant("slots without gaps", GEMM, "slot * args.b_slot_stride", "slot * args.cols * args.inner", r"c\["),
    Mutant(
        "rows of b without gaps",
        GEMM,
        "(col_begin + col) * args.b_row_stride",
        "(col_begin + col) * args.inner",
        r"c\[",
    ),
    Mutant(
        "rows of a transposed b without gaps",
        GEMM,
        "(depth_begin + k) * args.b_row_stride",
        "(depth_begin + k) * args.cols",
        r"c\[",
    ),
    Mutant("rows of varlen-K's a without gaps", VARLEN_K, "args.a, args.a_stride", "args.a, args.a_width", r"out\["),
    Mutant("rows of varlen-K's b without gaps", VARLEN_K, "args.b, args.b_stride", "args.b, args.b_width", r"out\["),
    Mutant(
        "varlen-K's slots without gaps",
        VARLEN_K,
        "slot * args.out_slot_stride",
        "slot * args.a_width * args.out_row_stride",
        r"out\[",
    ),
    Mutant("varlen-K's rows without gaps", VARLEN_K, "i * args.out_row_stride", "i * args.b_width", r"out\["),
    Mutant(
        "logits without gaps",
        SELECT,
        "t * io.row_stride, o.num_experts",
        "t * o.num_experts, o.num_experts",
        r"expert_id\[|Inf",
    ),
    Mutant(
        "summed logits without gaps", SELECT, "t * io.row_stride, column", "t * o.num_experts, column", r"prob_sum\["
    ),
    Mutant("selection takes one step", SELECT, "t += gridDim.x * num_warps", "t = o.num_tokens", r"expert_id\["),
    Mutant("last sums take one step", SELECT, "i < size; i += stride", "i < size; i = size", r"prob_sum\["),
    Mutant(
        "a token's block is reported",
        SELECT,
        "static_cast<unsigned long long>(t)",
        "static_cast<unsigned long long>(blockIdx.x)",
        "first token",
    ),
    Mutant(
        "the last breach is reported",
        SELECT,
        "atomicMin(reinterpret_cast<unsigned long long*>(io.breach), static_cast<unsigned long long>(t));",
        "*io.breach = t;",
        "first token",
    ),
    Mutant(
        "the token after the breach is reported",
        SELECT,
        "static_cast<unsigned long long>(t)",
        "static_cast<unsigned long long>(t + 1)",
        "first token",
    ),
    Mutant(
        "a token that is not valid is reported",
        SELECT,
        "io.valid_T == nullptr || io.valid_T[t] ?",
        "io.valid_T == nullptr || io.valid_T[t] || io.segment_T[t] == 16 ?",
        "first token",
    ),
    Mutant(
        "groups never masked",
        SELECT,
        "if (o.groups_kept < o.num_groups) mask_groups",
        "if (false) mask_groups",
        r"expert_id\[",
    ),
    Mutant(
        "keys outside the kept groups stay",
        SELECT_ROW,
        "if (!kept) row.key[e]",
        "if (false) row.key[e]",
        r"expert_id\[",
    ),
    Mutant("one group too many", SELECT_ROW, "i < o.groups_kept", "i <= o.groups_kept", r"expert_id\["),
    Mutant("a group's second best forgotten", SELECT_ROW, "top2 ? best + second : best", "best", r"expert_id\["),
    Mutant(
        "a group's second best always counts",
        SELECT_ROW,
        "top2 ? best + second : best",
        "best + second",
        r"expert_id\[",
    ),
    Mutant(
        "the second is any earlier one", SELECT_ROW, "max(second, min(best, value))", "min(best, value)", r"expert_id\["
    ),
    Mutant("groups judged without bias", SELECT_ROW, "score + bias[g * size + i]", "score", r"expert_id\["),
    Mutant("groups overlap", SELECT_ROW, "row.logit[g * size + i]", "row.logit[g + i]", r"expert_id\["),
    Mutant(
        "deep groups judged by scores that vanish", SELECT_ROW, "deep ? prob_of(o, stats, logit) : ", "", r"expert_id\["
    ),
    Mutant(
        "a constant beside the sum of all scores",
        SELECT_ROW,
        "if (!all_deep(o.score, sum)) return {0, Acc(1) / sum};",
        "return {0, Acc(1) / (sum + Acc(1e-20))};",
        r"prob_sum\[",
    ),
    Mutant(
        "a constant beside the sum of the chosen scores",
        SELECT_ROW,
        "if (!chosen.softmax && all_deep(o.score, sum)) {",
        "sum += Acc(1e-20);\n    if (false) {",
        r"weight\[",
    ),
    Mutant(
        "deep probabilities as steep for a root",
        SELECT_ROW,
        "steepness<Acc>(o.score) * (logit[e] - most)",
        "logit[e] - most",
        r"prob_sum\[",
    ),
    Mutant(
        "deep weights as steep for a root",
        SELECT_ROW,
        "steepness<Acc>(o.score) * (logit - chosen.most)",
        "logit - chosen.most",
        r"weight\[",
    ),
]


def test_every_mutant_finds_its_text() -> None:
    gone = [mutant.name for mutant in MUTANTS if mutant.old not in source_of(mutant).read_text()]
    assert not gone, f"these mutants name text that is no longer there: {gone}"


@pytest.mark.parametrize("mutant", mutant_params(MUTANTS))
def test_mutant_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    area = "select_experts" if mutant.file in {SELECT, SELECT_ROW} else "simple_kernels"
    require_caught(area, mutant, tmp_path)
