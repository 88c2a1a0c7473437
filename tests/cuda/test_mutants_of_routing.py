"""Breaks what route adds to select_experts, one way at a time, and requires the emulated test to notice each."""

from pathlib import Path

import pytest
from emulated_kernels import Mutant, mutant_params, require_caught, source_of

GROUP = "routing/group_pairs.cu"
BACKWARD = "routing/select_experts_backward.cu"
ROW = "routing/select_experts_row.cuh"

MUTANTS = [
    Mutant("a token is its choice", GROUP, "static_cast<int32_t>(i) / to.top_k", "static_cast<int32_t>(i)", r"token\["),
    Mutant("weights keep their order", GROUP, "to.weight_TK[i]", "to.weight_TK[n]", r"weight\["),
    Mutant(
        "places are those of pairs", GROUP, "to.place_TK[i] = n", "to.place_TK[n] = static_cast<int32_t>(i)", "place"
    ),
    Mutant(
        "the lane's own place is lost", GROUP, "write(next[bucket] + rank, i)", "write(next[bucket], i)", r"place\["
    ),
    Mutant("gradients keep their order", BACKWARD, "place == nullptr ? k : place[k]", "k", r"by place\["),
    Mutant("every token reads the first one's", BACKWARD, "io.place_TK + first", "io.place_TK", r"by place\["),
    Mutant("and so without places", BACKWARD, "io.dweight + first", "io.dweight", r"dlogits\["),
    Mutant("ids of no expert read", BACKWARD, "return id >= 0 &&", "return", r"dlogits|ended by signal"),
    Mutant(
        "sum over the chosen before their gradients are there",
        BACKWARD,
        "if (is_true_expert<Acc>(o, id[k])) dlogit[id[k]] += scale * dweight[k];  // a row's ids differ\n        }\n"
        "        __syncwarp();",
        "if (is_true_expert<Acc>(o, id[k])) dlogit[id[k]] += scale * dweight[k];\n        }",
        r"dlogits\[",
    ),
    Mutant("slopes forgotten", BACKWARD, "*= lone(o.score, logit[e]).log_slope", "*= 1", r"dlogits\["),
    Mutant(
        "weights of no sum pulled as of one",
        BACKWARD,
        "if (o.renormalise || chosen.softmax)",
        "if (true)",
        r"dlogits\[",
    ),
    Mutant("sums of weights pulled as none", BACKWARD, "dweight[k] - chosen_dot", "dweight[k]", r"dlogits\["),
    Mutant(
        "a constant beside the sum of the chosen",
        ROW,
        "if (!chosen.softmax && all_deep(o.score, sum)) {",
        "sum += Acc(1e-20);\n    if (false) {",
        r"dlogits\[",
    ),
    Mutant(
        "a constant beside the sum of all",
        ROW,
        "if (!all_deep(o.score, sum)) return {0, Acc(1) / sum};",
        "return {0, Acc(1) / (sum + Acc(1e-20))};",
        r"dlogits\[",
    ),
    Mutant("logits without gaps", BACKWARD, "t * io.row_stride", "t * E", r"dlogits\["),
    Mutant("gradient takes one step", BACKWARD, "t += gridDim.x * num_warps", "t = o.num_tokens", r"dlogits\["),
]


def test_every_mutant_finds_its_text() -> None:
    gone = [mutant.name for mutant in MUTANTS if mutant.old not in source_of(mutant).read_text()]
    assert not gone, f"these mutants name text that is no longer there: {gone}"


@pytest.mark.parametrize("mutant", mutant_params(MUTANTS))
def test_mutant_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    require_caught("routing", mutant, tmp_path)
