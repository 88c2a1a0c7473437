"""Axes for a number of ranks: what is left open is filled, what does not fit is refused with what would."""

import itertools
import math
import re
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.config import DataConfig, MeshConfig, ModelConfig, MoEConfig, RunConfig, SequenceConfig
from moetrain.config.mesh import nearest_axes, nearest_factorisations
from moetrain.config.sequence import largest_share, largest_share_up_to
from moetrain.sequence.zigzag import Zigzag


def test_nearest_factorisations_are_legal_and_ordered() -> None:
    assert nearest_factorisations((1, 3, 1), 8)[0] == (2, 4, 1)
    assert nearest_factorisations((2, 3), 6) == [(2, 3), (3, 2), (1, 6)]
    for factors in nearest_factorisations((4, 4, 4), 4096, count=100):
        assert math.prod(factors) == 4096


@given(st.integers(1, 48), st.lists(st.one_of(st.none(), st.integers(1, 9)), min_size=1, max_size=3), st.integers(1, 9))
def test_nearest_factorisations_by_brute_force(total: int, sizes: list[int | None], whole: int) -> None:
    """All factorisations, the last factor a divisor of ``whole``."""

    def change(factors: tuple[int, ...]) -> float:
        return sum(abs(math.log(new / old)) for new, old in zip(factors, sizes, strict=True) if old is not None)

    fits = [*[None] * (len(sizes) - 1), lambda size: whole % size == 0]
    legal = [
        factors
        for factors in itertools.product(range(1, total + 1), repeat=len(sizes))
        if math.prod(factors) == total and whole % factors[-1] == 0
    ]
    found = nearest_factorisations(sizes, total, fits=fits, count=2)
    assert set(found) <= set(legal)
    assert len(found) == min(2, len(legal))
    assert set(nearest_factorisations(sizes, total, fits=fits, count=None)) == set(legal)
    assert [change(factors) for factors in found] == pytest.approx(sorted(map(change, legal))[:2])


def run_of(**axes: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(num_heads=12, num_kv_heads=4, dense_first=1, dense_width=5),
        moe=MoEConfig(expert_width=96, shared_width=3),
        mesh=MeshConfig(**axes),
    )


REFUSED = [
    ({"ep": 3}, 4, "mesh: ep=3 * etp=1 = 3 must divide the number of ranks, 4"),
    ({"ep": 8}, 4, "mesh: ep=8 * etp=1 = 8 must divide the number of ranks, 4"),
    ({"etp": 16, "ep": 16}, 4, "ep=16 * etp=16 = 256 must divide"),
    ({"tp": 3}, 8, "dp_replicate=1 * tp=3 = 3 must divide the number of ranks, 8"),
    ({"tp": 12}, 6, "dp_replicate=1 * tp=12 = 12 must divide the number of ranks, 6"),
    ({"dp_replicate": 3}, 4, "dp_replicate=3 * tp=1 = 3 must divide the number of ranks, 4"),
    ({"dp_shard": 2}, 4, "dp_shard=2 is 2 but there are 4 ranks; start 2 ranks, or leave dp_shard out"),
    ({"dp_shard": 2, "tp": 4}, 4, "tp=4 * dp_shard=2 is 8 but there are 4 ranks; start 8 ranks"),
    ({"edp": 3}, 4, "edp=3 is 3 but there are 4 ranks; start 3 ranks, or leave edp out"),
    ({"edp": 2, "ep": 4}, 4, "edp=2 is 8 but there are 4 ranks"),
    ({"tp": 2, "ep": 7}, 4096, "ep=7 * etp=1 = 7 must divide the number of ranks, 4096"),
    ({"tp": 8}, 8, "mesh.tp (8) must divide model.num_heads (12)"),
    ({"tp": 8, "dp_shard": 2}, 16, "mesh.tp (8) must divide model.num_heads (12)"),
    ({"tp": 4}, 8, "mesh.tp (4) must be at most the shared experts' width (3), which is cut over it"),
    ({"tp": 6}, 6, "mesh.tp (6) must be at most model.dense_width (5), which is cut over it"),
    ({"etp": 5}, 10, "mesh.etp (5) must divide moe.expert_width (96)"),
    ({"etp": 64}, 128, "mesh.etp (64) must divide moe.expert_width (96)"),
]


@pytest.mark.parametrize(("axes", "ranks", "said"), REFUSED)
def test_what_does_not_fit_is_refused_with_what_would(axes: dict[str, int], ranks: int, said: str) -> None:
    """Each alternative is tried: the same run accepts it on the same ranks."""
    run = run_of(**axes)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        run.validate_for(ranks)
    _, _, legal = str(caught.value).partition("nearest legal axes: ")
    alternatives: list[dict[str, Any]] = [
        {axis: int(size) for axis, size in (part.split("=") for part in text.split())} for text in legal.split(", or ")
    ]
    assert 1 <= len(alternatives) <= 3
    for alternative in alternatives:
        mesh = replace(run, mesh=MeshConfig(**alternative)).validate_for(ranks)
        assert mesh.dp_replicate * (mesh.dp_shard or 0) * mesh.tp == ranks
        assert (mesh.edp or 0) * mesh.ep * mesh.etp == ranks


def test_alternatives_respect_what_is_cut() -> None:
    """Eight ranks cannot have tp = 8 with 12 heads, though 8 is nearest to 7 otherwise."""
    twelve = {"tp": lambda size: 12 % size == 0}
    assert nearest_axes({"dp_shard": None, "tp": 7}, 8) == "dp_shard=1 tp=8, or dp_shard=2 tp=4, or dp_shard=4 tp=2"
    assert nearest_axes({"dp_shard": None, "tp": 7}, 8, fits=twelve).startswith("dp_shard=2 tp=4, or")


def test_open_axes_are_what_remains() -> None:
    assert MeshConfig(tp=2, ep=4).resolve(16) == MeshConfig(dp_shard=8, tp=2, edp=4, ep=4)
    assert MeshConfig().resolve(1) == MeshConfig(dp_shard=1, edp=1)


@pytest.mark.parametrize(
    ("ranks", "options", "said"),
    [
        (3, {"capacity": 10}, r"times the 3 rank\(s\) .* must hold the longest one, of 40 tokens"),
        (4, {"capacity": 10}, None),
        (5, {"capacity": 8}, None),
        (5, {"capacity": 7}, r"sequence.capacity \(7\) times the 5 rank\(s\)"),
    ],
)
def test_all_ranks_together_hold_the_longest_document(ranks: int, options: dict[str, Any], said: str | None) -> None:
    run = RunConfig(
        data=DataConfig(packing="documents", context=40),
        sequence=SequenceConfig(planner="moetrain", **options),
    )
    with nullcontext() if said is None else pytest.raises(ValueError, match=said):
        run.validate_for(ranks)


def test_what_a_rank_holds_follows_from_what_a_sequence_is() -> None:
    rows = RunConfig(data=DataConfig(seq_len=32, micro_batch=3))
    assert (rows.capacity, rows.plans_tokens) == (96, False)
    documents = DataConfig(packing="documents", context=42)
    assert (RunConfig(data=documents).capacity, RunConfig(data=documents).plans_tokens) == (42, True)
    gangs = RunConfig(data=documents, mesh=MeshConfig(cp=4), sequence=SequenceConfig(planner="context"))
    assert gangs.capacity == max(Zigzag([42], 4).size(rank) for rank in range(4)) == 11
    assert RunConfig(data=documents, sequence=SequenceConfig(capacity=64)).capacity == 64


@given(st.integers(1, 400), st.integers(1, 40))
def test_the_largest_share_is_that_of_the_ring(num_tokens: int, num_ranks: int) -> None:
    parts = Zigzag([num_tokens], num_ranks)
    assert largest_share(num_tokens, num_ranks) == max(parts.size(rank) for rank in range(num_ranks))


@settings(max_examples=60)
@given(st.integers(0, 120), st.integers(1, 17))
def test_the_largest_share_of_any_sequence_up_to_a_length(num_tokens: int, num_ranks: int) -> None:
    most = max(largest_share(n, num_ranks) for n in range(num_tokens + 1))
    assert largest_share_up_to(num_tokens, num_ranks) == most
