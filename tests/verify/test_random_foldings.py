"""Foldings and settings drawn at random equal the oracle too; `--hypothesis-profile=search` draws new ones."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from verify.covering import mutations_of

from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.testing.ranks import RankPools
from moetrain.verify.compare import verify
from moetrain.verify.product.cases import foldings
from moetrain.verify.spec import VerifySpec

pytestmark = pytest.mark.dist

MOST_RANKS = 8


def two_level_nodes() -> list[tuple[tuple[int, ...], int]]:
    """Foldings with ranks of a node such that an ep group has several nodes, and several ranks on each."""
    found = []
    for folding in foldings():
        ranks, dp, replicas, tp, edp, ep, etp = folding
        for per_node in range(2, ranks):
            sizes: dict[str, Any] = {
                "dp_replicate": replicas,
                "dp_shard": dp,
                "tp": tp,
                "edp": edp,
                "ep": ep,
                "etp": etp,
            }
            mesh = FoldedMesh(**sizes, ranks_per_node=per_node)
            on_nodes = [Counter(map(mesh.node_of, group)).values() for group in mesh.all_groups("ep")]
            if all(len(shares) > 1 and set(shares) == {ep // len(shares)} != {1} for shares in on_nodes):
                found.append((folding, per_node))
    return found


ONE_LEVEL = [(folding, 8) for folding in foldings() if 1 < folding[0] <= MOST_RANKS]
TWO_LEVELS = two_level_nodes()


@pytest.fixture(scope="module")
def pools() -> Iterator[RankPools]:
    with RankPools(timeout_s=100.0) as ready:
        yield ready


@st.composite
def specs(draw: st.DrawFn) -> VerifySpec:
    """In float64, whose tolerance leaves no room for a mistake."""
    two_level = draw(st.booleans())
    (ranks, dp, replicas, tp, edp, ep, etp), per_node = draw(st.sampled_from(TWO_LEVELS if two_level else ONE_LEVEL))
    num_experts = draw(st.integers(1, 9))
    methods: list[dict[str, Any]] = [{}, {}, {"capacity_factor": 0.6}]
    if num_experts > 1:  # the score of a single expert is 1 in all tokens
        methods.append({"rounding": "nearest"})
    set_method = draw(st.sampled_from(methods))
    top_k = draw(st.integers(1, min(num_experts, 6)))
    by: dict[str, Any] = {}
    if "capacity_factor" in set_method:
        # The one weight of a token is 1 in all tokens, and verify wants decisions that rounding cannot turn.
        rules = ["position"] if top_k == 1 else ["weight", "position"]
        by = {"capacity_by": draw(st.sampled_from(rules)), "pad_to_capacity": draw(st.booleans())}
    return VerifySpec.of(
        ranks=ranks,
        mesh=f"dp_replicate={replicas},dp={dp},tp={tp}",
        experts=f"edp={edp},ep={ep},etp={etp}",
        steps=1,
        dtype="float64",
        router=draw(st.sampled_from(["softmax", "topk_softmax", "sigmoid"])),
        balance=draw(st.sampled_from(["lagged", "micro", "none"])),
        num_experts=num_experts,
        top_k=top_k,
        shared_experts=draw(st.integers(0, 2)),
        dense_first=draw(st.integers(0, 1)),
        activation=draw(st.sampled_from(["swiglu", "gelu", "relu2"])),
        accumulation=draw(st.integers(1, 2)),
        rows=draw(st.none() | st.integers(1, 5)),
        tie_embeddings=draw(st.booleans()),
        activation_checkpoint=draw(st.booleans()),
        seed=draw(st.integers(0, 1000)),
        dispatch_pieces=draw(st.sampled_from([1, 1, 2, 3])),
        ranks_per_node=per_node,
        two_level=two_level,
        **set_method,
        **by,
    )


def test_drawn_layouts_have_two_levels_where_they_say_so() -> None:
    assert len(TWO_LEVELS) > 20
    assert {folding[6] for folding, _ in TWO_LEVELS} == {1, 2}
    assert {folding[0] for folding, _ in TWO_LEVELS} == {4, 6, 8}


def assert_equal_and_its_fault_noticed(spec: VerifySpec, chance: int, pools: RankPools) -> None:
    report = verify(spec, pools)
    assert report.ok, (report.error, report.worst_tensors("grads", 3), report.wrong_counts)
    if spec.run.mesh.two_level:
        assert report.to_json()["dispatch"].startswith("in two levels")
    if spec.rows is not None:
        return  # a fault on a rank without tokens may show nothing
    names = list(mutations_of(spec))
    assert not verify(replace(spec, mutate=names[chance % len(names)]), pools).ok


@pytest.mark.timeout(600)  # pools of five sizes are started
@settings(max_examples=8, deadline=None)
@given(spec=specs(), chance=st.integers(0, 99))
def test_any_folding_equals_the_oracle_and_its_faults_do_not(spec: VerifySpec, chance: int, pools: RankPools) -> None:
    assert_equal_and_its_fault_noticed(spec, chance, pools)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=150, deadline=None)
@given(spec=specs(), chance=st.integers(0, 99))
def test_many_foldings_equal_the_oracle_and_their_faults_do_not(
    spec: VerifySpec, chance: int, pools: RankPools
) -> None:
    assert_equal_and_its_fault_noticed(spec, chance, pools)
