"""`moetrain verify` where experts move: every planner, way of sending and split equals the oracle; faults do not."""

from collections.abc import Iterator
from typing import Any

import pytest

from moetrain.testing.ranks import RankPools
from moetrain.verify.compare import verify
from moetrain.verify.report import VerifyReport
from moetrain.verify.spec import VerifySpec

pytestmark = pytest.mark.dist

BASE: dict[str, Any] = {
    "slots": 2,
    "plan_every": "micro_batch",
    "move_owners": True,
    "rematerialise": "always",
    "dtype": "float64",
}
FOUR = BASE | {"ranks": 4, "mesh": "dp=4", "experts": "ep=2", "steps": 2}
EIGHT = BASE | {"ranks": 8, "mesh": "dp=8", "experts": "ep=4,edp=2"}

CASES: dict[str, dict[str, Any]] = {
    "moetrain": FOUR | {"placement": "moetrain", "activation_checkpoint": True},
    "hecate, kept, a plan per step": FOUR | {"placement": "hecate", "rematerialise": "keep", "plan_every": "step"},
    "full, recomputed": FOUR | {"placement": "full", "activation_checkpoint": True},
    "random, recomputed and kept": FOUR
    | {"placement": "random", "activation_checkpoint": True, "rematerialise": "keep", "accumulation": 3},
    "no slots, fewer experts than ranks": FOUR | {"placement": "random", "slots": 0, "num_experts": 3},
    "ranks without tokens, experts nobody chose": FOUR
    | {"placement": "random", "rows": 2, "num_experts": 20, "top_k": 1, "slots": 5},
    "shards": FOUR | {"placement": "random", "experts": "ep=2,etp=2"},
    "under tensor parallelism": FOUR | {"placement": "random", "mesh": "dp=2,tp=2", "experts": "ep=4"},
    "two levels": FOUR | {"placement": "random", "two_level": True, "ranks_per_node": 2},
    "pieces": FOUR | {"placement": "random", "dispatch_pieces": 3},
    "whole tiles": FOUR | {"placement": "random", "rounding": "nearest"},
    "padded": FOUR
    | {"placement": "random", "capacity_factor": 1.25, "capacity_by": "position", "pad_to_capacity": True},
    "moments": FOUR | {"placement": "random", "optimizer": "adamw", "steps": 3},
    "in single": FOUR | {"placement": "moetrain", "dtype": "float32"},
    "calibrated, recomputed": FOUR | {"placement": "moetrain", "calibrate": True, "activation_checkpoint": True},
    "calibrated, as memory allows": FOUR | {"placement": "hecate", "calibrate": True, "rematerialise": "auto"},
    "one rank": BASE | {"ranks": 1, "placement": "moetrain", "steps": 2},
}
LARGE: dict[str, dict[str, Any]] = {
    **{name: EIGHT | {"placement": name, "activation_checkpoint": True} for name in ("hecate", "random", "full")},
    "shards": EIGHT | {"placement": "moetrain", "experts": "ep=4,etp=2"},
    "two levels": EIGHT | {"placement": "moetrain", "two_level": True, "ranks_per_node": 4},
    "pieces": EIGHT | {"placement": "moetrain", "dispatch_pieces": 2},
    "whole tiles": EIGHT | {"placement": "moetrain", "rounding": "nearest"},
    "moments": EIGHT | {"placement": "moetrain", "optimizer": "adamw", "steps": 3},
    "two levels, pieces, tiles, recomputed": EIGHT
    | {"placement": "random", "two_level": True, "ranks_per_node": 4, "dispatch_pieces": 2, "rounding": "nearest"}
    | {"activation_checkpoint": True},
    "padded, two levels": EIGHT
    | {"placement": "random", "two_level": True, "ranks_per_node": 4, "capacity_factor": 1.25}
    | {"capacity_by": "position", "pad_to_capacity": True},
}
FAULTS = {name: FOUR | {"placement": "moetrain"} for name in ("drop-holder", "average", "drop-seat", "swap-owners")}
FAULTS |= {"lose-moment": FOUR | {"placement": "moetrain", "optimizer": "adamw", "steps": 3}}


@pytest.fixture(scope="module")
def pools() -> Iterator[RankPools]:
    with RankPools(timeout_s=100.0) as ready:
        yield ready


def tell(report: VerifyReport) -> str:
    return f"{report.spec}: {report.error or report.to_json()['steps']}"


def assert_equal(options: dict[str, Any], pools: RankPools) -> None:
    report = verify(VerifySpec.of(**options), pools)
    assert report.ok, tell(report)


@pytest.mark.parametrize("name", CASES)
def test_moving_experts_equal_the_oracle(name: str, pools: RankPools) -> None:
    assert_equal(CASES[name], pools)


def test_eight_ranks_with_all_of_it(pools: RankPools) -> None:
    assert_equal(EIGHT | {"placement": "moetrain", "activation_checkpoint": True}, pools)


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_eight_ranks_equal_the_oracle(name: str, pools: RankPools) -> None:
    assert_equal(LARGE[name], pools)


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_moving_experts_are_noticed(name: str, pools: RankPools) -> None:
    report = verify(VerifySpec.of(**FAULTS[name], mutate=name), pools)
    assert report.error is None, tell(report)
    assert not report.ok
    worst = max(report.max_rel_error_grad, report.max_rel_error_param)
    assert worst > 10 * report.tolerance, tell(report)


def test_a_stale_plan_is_told_before_it_is_used(pools: RankPools) -> None:
    report = verify(VerifySpec.of(**FOUR, placement="moetrain", mutate="stale-plan"), pools)
    assert not report.ok
    assert report.error is not None
    assert "ranks have planned different placements of layer 1" in report.error
    assert "ranks [0] against ranks [1, 2, 3]" in report.error


def test_what_has_nothing_to_move_is_refused() -> None:
    with pytest.raises(ValueError, match="--move-owners needs experts that may move, but --placement is static"):
        VerifySpec.of(ranks=2, mesh="dp=2", move_owners=True)
    with pytest.raises(
        ValueError, match="--steps 1 would end before a plan of --placement moetrain is used; use --steps"
    ):
        VerifySpec.of(ranks=2, mesh="dp=2", placement="moetrain", steps=1)
    assert VerifySpec.of(ranks=2, mesh="dp=2", placement="moetrain", optimizer="adamw").num_steps == 3
    rounds = {"ranks": 4, "mesh": "dp=4", "experts": "ep=1", "placement": "moetrain", "rounding": "nearest"}
    assert VerifySpec.of(**rounds, mutate="round-alone").mutate == "round-alone"
    two = {"ranks": 6, "mesh": "dp=6", "experts": "ep=2,edp=3", "placement": "moetrain", "two_level": True}
    with pytest.raises(
        ValueError, match=r"rows go over edp=3 \* ep=2 = 6 ranks .* nodes have 4 ranks; choose mesh.ranks"
    ):
        VerifySpec.of(**two, ranks_per_node=4)
    assert VerifySpec.of(**two, ranks_per_node=3).run.mesh.two_level
    moving: dict[str, Any] = {"ranks": 2, "mesh": "dp=2", "placement": "moetrain"}
    for name, options, text in (
        ("swap-owners", {}, "needs owners that move; use --move-owners"),
        (
            "lose-moment",
            {"move_owners": True},
            "needs moments that move, but --optimizer is sgd; use",
        ),
        ("swap-owners", {"ranks": 1, "mesh": "", "move_owners": True}, "needs experts that may move, but --placement"),
        ("drop-seat", {"slots": 0}, "needs replicas that are planned, but --placement is moetrain and --slots 0"),
        (
            "drop-holder",
            {"slots": 0},
            "needs an expert with more than one holder, but there is one rank",
        ),
    ):
        with pytest.raises(ValueError, match=f"--mutate {name} {text}"):
            VerifySpec.of(**(moving | options), mutate=name)
