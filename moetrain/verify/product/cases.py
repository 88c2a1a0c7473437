"""Every folding of up to eight ranks with every setting: what `moetrain verify product` goes through.

A folding is (ranks, dp_shard, dp_replicate, tp, edp, ep, etp), and a case a folding followed by its settings.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from moetrain.verify.layouts import Layout
from moetrain.verify.small import SMALL
from moetrain.verify.spec import VerifySpec

RANKS = (1, 2, 3, 4, 6, 8)
AXES = ("dp_shard", "dp_replicate", "tp", "edp", "ep", "etp")
SETTINGS = {
    "top_k": (1, 2, 6),
    "num_experts": (6, 8),
    "shared_experts": (0, 1),
    "dense_first": (0, 1),
    "accumulation": (1, 2),
    "router": ("softmax", "sigmoid"),
}
BATCHES = "accumulation"  # the setting that leaves the model as it is
BLOCK = 12  # models that are tried on every folding before the next ones
STRIDE = 29  # between neighbouring models: those of a block have every value of every setting
Case = tuple[object, ...]


def factorisations(ranks: int) -> list[tuple[int, int, int]]:
    """All ways to write ``ranks`` as a product of three."""
    divisors = [size for size in range(1, ranks + 1) if ranks % size == 0]
    return [(a, b, ranks // (a * b)) for a in divisors for b in divisors if ranks % (a * b) == 0]


def foldings() -> list[tuple[int, ...]]:
    """Every attention mesh with every expert mesh."""
    return [
        (ranks, *attention, *experts)
        for ranks in RANKS
        for attention in factorisations(ranks)
        for experts in factorisations(ranks)
    ]


def spec_of(case: Case, index: int = 0, **options: object) -> VerifySpec:
    """The comparison that a case asks for; the type of numbers alternates with ``index``."""
    ranks, dp, replicas, tp, edp, ep, etp, *settings = case
    given = {
        "dtype": ("float64", "float32")[index % 2],
        "steps": 2,
        **dict(zip(SETTINGS, settings, strict=True)),
        **options,
    }
    return VerifySpec.of(
        ranks=ranks,
        mesh=f"dp_replicate={replicas},dp={dp},tp={tp}",
        experts=f"edp={edp},ep={ep},etp={etp}",
        **given,
    )


def case_id(case: Case) -> str:
    """Short and unique."""
    ranks, dp, replicas, tp, edp, ep, etp, *settings = case
    return f"{ranks}-dp{dp}x{replicas}-tp{tp}-edp{edp}-ep{ep}-etp{etp}-" + "-".join(map(str, settings))


@dataclass(frozen=True, slots=True)
class Unit:
    """Cases of one folding and one model, which an engine runs one after another, all in one type of numbers."""

    folding: tuple[int, ...]
    block: int  # units of a block share what the oracle said
    cases: tuple[Case, ...]
    dtype: str

    def specs(self) -> list[VerifySpec]:
        """The comparison of each case: one step of one layer with experts, behind a dense one where the case has it."""
        return [spec_of(case, steps=1, moe_layers=1, dtype=self.dtype) for case in self.cases]


def units() -> Iterator[Unit]:
    """The whole product. A part of it from the beginning has all foldings with some models, not some foldings.

    Half the models of each folding, and half the foldings of each model, are in float64, the others in float32.
    """
    names = [name for name in SETTINGS if name != BATCHES]
    models = [dict(zip(names, values, strict=True)) for values in product(*(SETTINGS[name] for name in names))]
    ordered = [models[index * STRIDE % len(models)] for index in range(len(models))]
    for first in range(0, len(models), BLOCK):
        for folding_idx, folding in enumerate(foldings()):
            for model_idx, model in enumerate(ordered[first : first + BLOCK], first):
                choices = [{**model, BATCHES: batches} for batches in SETTINGS[BATCHES]]
                cases = tuple((*folding, *(choice[name] for name in SETTINGS)) for choice in choices)
                dtype = ("float64", "float32")[(folding_idx + model_idx) % 2]
                yield Unit(folding, first // BLOCK, cases, dtype)


def shard_of(all_units: Sequence[Unit], shard: int, num_shards: int) -> list[Unit]:
    """Part ``shard`` of ``num_shards``, counted from 1: a sample of all settings, the same on every machine.

    Which units are in it is drawn, since every so many-th unit would share settings; their order stays.
    """
    order = list(range(len(all_units)))
    random.Random(0).shuffle(order)
    return [all_units[index] for index in sorted(order[shard - 1 :: num_shards])]


def refused_layouts() -> dict[int, int]:
    """By number of ranks, how many of the 6**6 choices of axis sizes out of ``RANKS`` are no legal ``Layout``.

    An attention mesh and an expert mesh are refused each for itself, so 2 * 6**3 layouts per number of ranks tell.
    """
    sizes = list(product(RANKS, repeat=3))
    refused = {}
    for ranks in RANKS:
        attention = sum(_accepts(ranks, f"dp={a},dp_replicate={b},tp={c}", "") for a, b, c in sizes)
        experts = sum(_accepts(ranks, f"dp={ranks}", f"edp={a},ep={b},etp={c}") for a, b, c in sizes)
        refused[ranks] = len(sizes) ** 2 - attention * experts
    return refused


def _accepts(ranks: int, mesh: str, experts: str) -> bool:
    heads, width = SMALL["model.num_heads"], SMALL["moe.expert_width"]
    return Layout(ranks=ranks, mesh=mesh, experts=experts, num_heads=heads, expert_width=width).accepts()
