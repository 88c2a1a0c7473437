"""Breaks the kernels of token rounding, one way at a time, and requires the emulated test to notice each."""

from pathlib import Path

import pytest
from emulated_kernels import Mutant, mutant_params, require_caught, source_of

FEW = "rounding/first_few.cuh"
OFFER = "rounding/offer_pairs.cu"
ROUND = "rounding/round_pairs.cu"

OFFERED = r"(offers|offered token)\[|ended by signal|deadlock"
ROUNDED = r"(added|dropped|offset|token|source)\[|ended by signal|deadlock"

MUTANTS = [
    Mutant("losers ranked as winners", FEW, "return reversed ? ~ascending : ascending", "return ascending", OFFERED),
    Mutant(
        "of equal losers the lower id first",
        FEW,
        "return reversed ? comes_before(token_gid_T2, b_token, a_token) : comes_before(token_gid_T2, a_token, b_token)",
        "return comes_before(token_gid_T2, a_token, b_token)",
        OFFERED,
    ),
    Mutant(
        "what has the floor's word always enters",
        FEW,
        "return floor->token < 0 || ranking.precedes(its_word, its_token, floor->word, floor->token)",
        "return floor->token < 0",
        OFFERED,
    ),
    Mutant(
        "no place counts as one", FEW, "if (place >= room) return false;", "if (place >= room) return true;", OFFERED
    ),
    Mutant(
        "the sort ascends everywhere",
        FEW,
        "(low & run) == 0",
        "true",
        OFFERED,
    ),
    Mutant("the sort starts late", FEW, "int run = 2; run <= size", "int run = 4; run <= size", OFFERED),
    Mutant("the sort ends early", FEW, "int run = 2; run <= size", "int run = 2; run < size", OFFERED),
    Mutant("neighbours exchanged before all have", FEW, "            team.sync();\n", "", OFFERED),
    Mutant(
        "sorted before the rest is cleared",
        FEW,
        "        few.word[i] = 0;\n    team.sync();\n",
        "        few.word[i] = 0;\n",
        OFFERED,
    ),
    Mutant("the rest is not cleared", FEW, "        few.word[i] = 0;\n", "        ;\n", OFFERED),
    Mutant("places count the lane itself", FEW, "((1U << lane) - 1)", "((2U << lane) - 1)", OFFERED),
    Mutant("every 32 kept from the start", FEW, "kept + __popc(stayers & ", "__popc(stayers & ", OFFERED),
    Mutant(
        "one too few kept of equals", FEW, "few.wanted - 1], few.wanted}", "few.wanted - 1], few.wanted - 1}", OFFERED
    ),
    Mutant("a floor that keeps too few", FEW, "if (above >= few.wanted && above", "if (above > 0 && above", OFFERED),
    Mutant("fillers of every expert's first", OFFER, "mask + e / kBitsPerWord * pairs.num_tokens", "mask", OFFERED),
    Mutant("bits of another expert", OFFER, "1U << (e % kBitsPerWord)", "1U << (e % 16)", OFFERED),
    Mutant(
        "pairs belong to the expert before", OFFER, "pairs.offset[middle] <= n", "pairs.offset[middle] < n", OFFERED
    ),
    Mutant("only one bit per word", OFFER, "atomicOr(mask + e", "atomicMin(mask + e", OFFERED),
    Mutant("invalid tokens fill", OFFER, "valid[i % num_tokens] ? 0", "true ? 0", OFFERED),
    Mutant("scores that are not finite fill", OFFER, "if (score - score == 0) pending", "pending", OFFERED),
    Mutant(
        "rows as wide as the experts",
        OFFER,
        "in.score_TE[t * in.stride + e]",
        "in.score_TE[t * in.pairs.num_experts + e]",
        OFFERED,
    ),
    Mutant(
        "a slab's last tokens forgotten",
        OFFER,
        "first < slab_end; first += kLoads * step",
        "first + step < slab_end; first += kLoads * step",
        OFFERED,
    ),
    Mutant("tokens of the next load", OFFER, "first + row + i * step);", "first + row + (i + 1) * step);", OFFERED),
    Mutant(
        "lists shrunk while others append",
        OFFER,
        "shrink(lists.of(c), ranking, threadIdx.x % kWarpSize);\n            __syncthreads();",
        "shrink(lists.of(c), ranking, threadIdx.x % kWarpSize);",
        OFFERED,
    ),
    Mutant(
        "appended before the lists are empty",
        OFFER,
        "        candidates[column] = 0;\n    }\n    __syncthreads();",
        "        candidates[column] = 0;\n    }",
        OFFERED,
    ),
    Mutant(
        "written before all have counted",
        OFFER,
        "atomicAdd(candidates + column, num_candidates);\n    __syncthreads();",
        "atomicAdd(candidates + column, num_candidates);",
        OFFERED,
    ),
    Mutant(
        "candidates not added up",
        OFFER,
        "num_candidates += __popc(next.fills)",
        "num_candidates = __popc(next.fills)",
        OFFERED,
    ),
    Mutant("the first slab's fillers alone", OFFER, "plan.num_slabs * plan.room;", "plan.room;", OFFERED),
    Mutant("every slab's list is the first", OFFER, "i / plan.room * num_experts + e", "e", OFFERED),
    Mutant("lists read beyond their end", OFFER, "if (place >= scratch.size[list]) return false;", "", OFFERED),
    Mutant("one candidate's count of many", OFFER, "slab * num_experts + e];", "e];", OFFERED),
    Mutant("chosen from the list's start", OFFER, "in.pairs.token[first_pair + at]", "in.pairs.token[at]", OFFERED),
    Mutant(
        "both sides' tokens in one place",
        OFFER,
        "token_E2M + (2 * e + side) * in.tile",
        "token_E2M + 2 * e * in.tile",
        OFFERED,
    ),
    Mutant(
        "merged while others append",
        OFFER,
        "shrink(few, ranking, threadIdx.x);\n            __syncthreads();",
        "shrink(few, ranking, threadIdx.x);",
        OFFERED,
    ),
    Mutant(
        "merged before the list is empty",
        OFFER,
        "if (threadIdx.x == 0) few.reset();\n    __syncthreads();",
        "if (threadIdx.x == 0) few.reset();",
        OFFERED,
    ),
    Mutant("the last loads forgotten", OFFER, "first - threadIdx.x < size", "first + kThreads <= size", OFFERED),
    Mutant(
        "cells in the order of ranks",
        ROUND,
        "slot += in.holder_of(other, e) < holder",
        "slot += other < w",
        ROUNDED,
    ),
    Mutant(
        "steps cleared after they are written",
        ROUND,
        "step[w] = 0;\n    __syncthreads();",
        "step[w] = 0;",
        ROUNDED,
    ),
    Mutant("all cells may go up", ROUND, "cell.under(in.tile) <= cell.candidates ? over : -over", "over", ROUNDED),
    Mutant("surplus of another cell", ROUND, "e * in.world + surplus.slot_E[e]", "e * in.world", ROUNDED),
    Mutant("surplus after the cell itself", ROUND, "if (lane == turn) before = sum;\n", "", ROUNDED),
    Mutant("cells in any order", ROUND, "left &= left - 1) {", "left = 0) {", ROUNDED),
    Mutant(
        "the residual starts anew", ROUND, "int64_t before = sum;", "sum = 0;\n        int64_t before = sum;", ROUNDED
    ),
    Mutant("of equals the higher rank", ROUND, "return a.from < b.from;", "return a.from > b.from;", ROUNDED),
    Mutant(
        "losers taken as winners",
        ROUND,
        "if (side == OfferRow::kFill ? wins(a.entry, b.entry) : wins(b.entry, a.entry)) return true;",
        "if (wins(a.entry, b.entry)) return true;",
        ROUNDED,
    ),
    Mutant(
        "offers to other holders taken",
        ROUND,
        "if (in.holder_of(from, e) != holder) continue;\n        const OfferRow",
        "const OfferRow",
        ROUNDED,
    ),
    Mutant(
        "a lane's first rank alone",
        ROUND,
        "from < in.world; from += step) {",
        "from < in.world; from += in.world) {",
        ROUNDED,
    ),
    Mutant(
        "neighbours alone compared",
        ROUND,
        "step < lanes; step *= 2) {\n            Head other",
        "step < 2; step *= 2) {\n            Head other",
        ROUNDED,
    ),
    Mutant(
        "one lane counts while others read",
        ROUND,
        "        __syncwarp();  // one lane is about to count on, where no other seat holds it up\n",
        "",
        ROUNDED,
    ),
    Mutant("counts of the expert before", ROUND, "used[from] = 0;\n    __syncwarp();", "used[from] = 0;", ROUNDED),
    Mutant("warps share their counts", ROUND, "memory + threadIdx.x / kWarpSize * in.world", "memory", ROUNDED),
    Mutant("all that is taken is mine", ROUND, "taken.mine += best.from == in.rank", "taken.mine += 1", ROUNDED),
    Mutant(
        "sums of what is mine", ROUND, "taken.sum += score", "if (best.from == in.rank) taken.sum += score", ROUNDED
    ),
    Mutant("one draw for all", ROUND, "static_cast<uint64_t>(e)", "0", ROUNDED),
    Mutant("offsets of 32 experts", ROUND, "before + sum;\n", "sum;\n", ROUNDED),
    Mutant("offsets that count twice", ROUND, "if (lane >= step) sum += lower;", "sum += lower;", ROUNDED),
    Mutant("tokens that move are not sorted", ROUND, "return moved[i] < moved[j];", "return i < j;", ROUNDED),
    Mutant("sorted before all are there", ROUND, ": INT32_MAX;\n    __syncthreads();", ": INT32_MAX;", ROUNDED),
    Mutant(
        "half of those that move",
        ROUND,
        "while (size < num_moved)\n        size *= 2;",
        "while (2 * size < num_moved)\n        size *= 2;",
        ROUNDED,
    ),
    Mutant("those that drop", ROUND, "(adds ? OfferRow::kFill : OfferRow::kDrop)", "OfferRow::kDrop", ROUNDED),
    Mutant(
        "dropped ones stay", ROUND, "moved[below] == chosen[i]) continue;", "moved[below] == chosen[i]) {}", ROUNDED
    ),
    Mutant("places do not move", ROUND, "+ (adds ? below : -below)", "", ROUNDED),
    Mutant("fillers where they were offered", ROUND, "num_below(chosen, num_chosen, moved[i])", "0", ROUNDED),
    Mutant(
        "fillers' sources by expert",
        ROUND,
        "moved[i] * num_experts + e)",
        "e * in.pairs.num_tokens + moved[i])",
        ROUNDED,
    ),
    Mutant(
        "the first part alone",
        ROUND,
        "static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; i < num_chosen",
        "threadIdx.x; i < num_chosen && blockIdx.y == 0",
        ROUNDED,
    ),
    Mutant(
        "what is behind the last pair",
        ROUND,
        "for (int32_t* list : {out.token, out.source})",
        "for (int32_t* list : {out.token})",
        ROUNDED,
    ),
]


def test_every_mutant_finds_its_text() -> None:
    gone = [mutant.name for mutant in MUTANTS if mutant.old not in source_of(mutant).read_text()]
    assert not gone, f"these mutants name text that is no longer there: {gone}"


@pytest.mark.parametrize("mutant", mutant_params(MUTANTS))
def test_mutant_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    require_caught("round_pairs", mutant, tmp_path)
