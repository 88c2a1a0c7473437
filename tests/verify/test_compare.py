"""`moetrain verify` itself: parallel runs equal the oracle, and faults are noticed."""

import contextlib
import itertools
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from verify.covering import covering, levels, mutations_of, pairs, wanted_pairs

from moetrain.cli.verify import main
from moetrain.testing.ranks import RankPools
from moetrain.verify.compare import RunFailedError, measure, verify
from moetrain.verify.mutations import MUTATIONS
from moetrain.verify.product.cases import case_id
from moetrain.verify.product.cases import spec_of as case_spec
from moetrain.verify.report import VerifyReport
from moetrain.verify.spec import VerifySpec

pytestmark = pytest.mark.dist

LAYOUTS = [(ranks, ep) for ranks in (1, 2, 3, 4) for ep in range(1, ranks + 1) if ranks % ep == 0]


@pytest.fixture(scope="module")
def pools() -> Iterator[RankPools]:
    with RankPools(timeout_s=100.0) as ready:
        yield ready


def spec_of(ranks: int, ep: int, **options: object) -> VerifySpec:
    return VerifySpec.of(ranks=ranks, mesh=f"dp={ranks}", experts=f"ep={ep}", **options)


def tell(report: VerifyReport) -> str:
    worst = [*report.worst_tensors("grads", 3), *report.worst_tensors("params", 3)]
    return f"{report.error or ''} loss {report.max_rel_error_loss} worst {worst} counts {report.wrong_counts}"


COVERING = covering()
IN_SUMS = ("local-lse", "drop-ring-step", "local-positions", "swap-parts", "scale-by-rank")
OF_SEQUENCES = (*IN_SUMS, "stale-offload", "plan-differs")  # documents have no part in foldings


def test_the_covering_array_covers() -> None:
    shown = {pair for case in COVERING for pair in pairs((*levels(case[:7]), *case[7:]))}  # type: ignore[arg-type]
    assert shown == wanted_pairs()
    assert len(COVERING) <= 40
    assert {case[0] for case in COVERING} == {1, 2, 3, 4, 6, 8}
    missing_one = {pair for case in COVERING[1:] for pair in pairs((*levels(case[:7]), *case[7:]))}  # type: ignore[arg-type]
    assert missing_one != wanted_pairs(), "the first case is needed"


@pytest.mark.parametrize("index", range(len(COVERING)), ids=[case_id(case) for case in COVERING])
def test_foldings_equal_the_oracle(index: int, pools: RankPools) -> None:
    report = verify(case_spec(COVERING[index], index), pools)
    assert report.ok, tell(report)


FAULTS = [(index, name) for index in range(len(COVERING)) for name in mutations_of(case_spec(COVERING[index]))]


def test_every_fault_that_can_be_put_into_a_folding_is_tried() -> None:
    for index, case in enumerate(COVERING):
        tried = {name for of, name in FAULTS if of == index}
        assert tried == {name for name in MUTATIONS if accepts(case, name)}, case_id(case)


def accepts(case: tuple[object, ...], name: str) -> bool:
    try:
        return case_spec(case, mutate=name).mutate == name
    except ValueError:
        return False


def one_fault_of_each() -> list[tuple[int, str]]:
    """For every case the fault that the cases before it had least often."""
    had: Counter[str] = Counter()
    chosen = []
    for index in range(len(COVERING)):
        name = min((name for of, name in FAULTS if of == index), key=lambda name: had[name])
        had[name] += 1
        chosen.append((index, name))
    return chosen


ONE_OF_EACH = one_fault_of_each()


def test_the_faults_of_the_quick_suite_are_all_faults_of_foldings() -> None:
    of_moving = {"drop-seat", "swap-owners", "lose-moment", "stale-plan"}  # test_moving.py
    assert {name for _, name in ONE_OF_EACH} == {name for _, name in FAULTS}
    assert {name for _, name in FAULTS} == {*MUTATIONS} - {"round-alone"} - of_moving - {*OF_SEQUENCES}


@pytest.mark.parametrize(
    ("index", "name"),
    [
        pytest.param(*fault, id=f"{case_id(COVERING[fault[0]])}-{fault[1]}", marks=marks)
        for fault in FAULTS
        for marks in [[] if fault in ONE_OF_EACH else [pytest.mark.slow]]
    ],
)
def test_every_fault_is_noticed_in_every_folding(index: int, name: str, pools: RankPools) -> None:
    """In float32, whose tolerance could hide more."""
    assert_noticed(case_spec(COVERING[index], 1, steps=1, mutate=name), pools)


def sequences_of(ranks: int, planner: str, **options: Any) -> VerifySpec:
    return VerifySpec.of(**{"ranks": ranks, "sequence": planner, "capacity": 24, "steps": 1, **options})


SPECIAL = {
    "replicated": VerifySpec.of(ranks=4, mesh="dp_replicate=2,dp=2", experts="ep=2"),
    "replicated, not sharded": VerifySpec.of(ranks=2, mesh="dp_replicate=2", experts="ep=2"),
    "ranks without tokens": spec_of(4, 2, rows=2, dtype="float64"),
    "one row": spec_of(3, 3, rows=1),
    "a last round without tokens": spec_of(2, 2, rows=5),
    "every expert chosen": spec_of(2, 2, num_experts=6, top_k=6),
    "one expert chosen": spec_of(2, 2, num_experts=5, top_k=1, dtype="float64"),
    "fewer experts than ranks": spec_of(4, 4, num_experts=3),
    "one expert": spec_of(2, 2, num_experts=1, top_k=1),
    "micro balance": spec_of(2, 2, balance="micro", dtype="float64"),
    "no balance": spec_of(2, 1, balance="none"),
    "tied gelu": spec_of(2, 2, tie_embeddings=True, activation="gelu", dtype="float64"),
    "relu2 after top-k": spec_of(2, 1, activation="relu2", router="topk_softmax"),
    "groups": spec_of(2, 2, num_groups=4, groups_kept=2, router="sigmoid"),
    "recomputed": spec_of(2, 2, activation_checkpoint=True, router="sigmoid"),
    "recomputed on one rank": spec_of(1, 1, activation_checkpoint=True),
    "recomputed, not sharded, ranks without tokens": VerifySpec.of(
        ranks=3, mesh="dp_replicate=3", rows=2, activation_checkpoint=True, router="topk_softmax"
    ),
    "three micro-batches": spec_of(2, 2, accumulation=3),
    "one micro-batch": spec_of(2, 1, accumulation=1),
    "rounded": spec_of(2, 2, rounding="nearest", steps=2),
    "rounded to balance, by sigmoid, recomputed": spec_of(
        4, 2, rounding="balance", router="sigmoid", activation_checkpoint=True, balance="micro", steps=1
    ),
    "rounded at random": spec_of(2, 2, rounding="stochastic", dtype="float64", num_experts=6, steps=2),
    "rounded by score, local experts": spec_of(2, 1, rounding="nearest_score", router="topk_softmax", steps=2),
    "rounded up, ranks without tokens": spec_of(4, 4, rounding="up", rows=2, dtype="float64", steps=2),
    "rounded over slices of rows": VerifySpec.of(
        ranks=4, mesh="dp=2,tp=2", experts="ep=2,etp=2", rounding="nearest", steps=1
    ),
    "rounded, three slices of a row, padding in the last": VerifySpec.of(
        ranks=3, mesh="tp=3", experts="ep=3", rounding="balance", steps=1, dtype="float64"
    ),
    "within capacity by weight": VerifySpec.of(
        ranks=4, mesh="dp=2,tp=2", experts="ep=2,etp=2", capacity_factor=0.5, dtype="float64", steps=2
    ),
    "within capacity by position, recomputed": spec_of(
        2, 2, capacity_factor=0.7, capacity_by="position", activation_checkpoint=True, steps=2
    ),
    "next to no capacity": spec_of(2, 1, capacity_factor=0.01, steps=1),
    "micro balance over slices of rows": VerifySpec.of(ranks=2, mesh="tp=2", experts="ep=2", balance="micro", steps=1),
    "tied, more slices than key heads divide into": VerifySpec.of(
        ranks=8, mesh="tp=8", experts="ep=4", tie_embeddings=True, activation_checkpoint=True, steps=1
    ),
    "in pieces, recomputed, experts in shards": VerifySpec.of(
        ranks=4, mesh="dp=2,tp=2", experts="ep=2,etp=2", dispatch_pieces=3, activation_checkpoint=True, steps=1
    ),
    "two levels, more ranks on a node than parts": VerifySpec.of(
        ranks=8, mesh="dp=4,tp=2", experts="ep=4,etp=2", two_level=True, ranks_per_node=4, dtype="float64", steps=2
    ),
    "two levels in pieces, ranks without tokens and without experts": VerifySpec.of(
        ranks=4, mesh="dp=4", experts="ep=4", num_experts=3, two_level=True, ranks_per_node=2, dispatch_pieces=2, rows=2
    ),
    "padded, ranks without tokens": spec_of(4, 4, capacity_factor=0.7, pad_to_capacity=True, rows=2, dtype="float64"),
    "padded, in pieces, experts in shards": VerifySpec.of(
        ranks=4,
        mesh="dp=4",
        experts="ep=2,etp=2",
        capacity_factor=1.0,
        pad_to_capacity=True,
        dispatch_pieces=2,
        seed=24,  # the first whose decisions are clear in every step
    ),
    "padded, two levels, recomputed": VerifySpec.of(
        ranks=8,
        mesh="dp=4,tp=2",
        experts="ep=4,etp=2",
        capacity_factor=1.0,
        pad_to_capacity=True,
        two_level=True,
        ranks_per_node=4,
        activation_checkpoint=True,
        capacity_by="position",
        steps=1,
    ),
    "one rank per document, some lanes empty": sequences_of(4, "data"),
    "gangs of one size, recomputed": sequences_of(4, "context", experts="ep=2", activation_checkpoint=True),
    "as few ranks as hold a document": sequences_of(8, "bytescale", experts="ep=2", dtype="float64"),
    "gangs of any size beside experts": sequences_of(8, "moetrain", experts="ep=4"),
    "gangs inside tensor parallelism, rounded": sequences_of(
        8, "moetrain", mesh="dp=4,tp=2", experts="ep=4", rounding="nearest", dtype="float64"
    ),
    "blocks with rounds of their own": sequences_of(
        8, "moetrain", experts="ep=2", reshard_after_forward=False, dtype="float64"
    ),
    "gangs and experts that move": sequences_of(4, "moetrain", experts="ep=2", placement="moetrain", steps=2),
    "half of the activations on the host": sequences_of(4, "moetrain", offload=0.5, dense_first=2, dtype="float64"),
    "all activations on the host, recomputed": sequences_of(
        4, "bytescale", experts="ep=2", offload=1.0, activation_checkpoint=True, dense_first=2
    ),
    "dropped": spec_of(2, 2, rounding="down", tile=8, steps=1),
    "adamw": spec_of(2, 1, optimizer="adamw"),
    "adamw in double": spec_of(3, 3, optimizer="adamw", dtype="float64"),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_special_cases_equal_the_oracle(name: str, pools: RankPools) -> None:
    report = verify(SPECIAL[name], pools)
    assert report.ok, tell(report)


def faults_of(ranks: int, ep: int) -> list[str]:
    """The mutations that apply to a layout."""
    return [
        "scale-weight",
        *(["wrong-group"] if ranks > 1 else []),
        *(["drop-holder", "average"] if ep < ranks else []),
    ]


def mutants() -> list[VerifySpec]:
    layouts = [(1, 1, "float64"), (2, 1, "float64"), (2, 2, "float32"), (3, 1, "float32"), (4, 2, "float32")]
    faults = [
        spec_of(ranks, ep, dtype=dtype, steps=1, mutate=name)
        for ranks, ep, dtype in layouts
        for name in faults_of(ranks, ep)
    ]
    faults += [spec_of(4, 2, rows=2, steps=1, mutate=name) for name in faults_of(4, 2)]
    faults.append(VerifySpec.of(ranks=2, mesh="dp_replicate=2", steps=1, mutate="wrong-group"))
    faults.append(spec_of(2, 1, optimizer="adamw", mutate="average"))
    faults.append(spec_of(2, 2, rounding="nearest", steps=1, mutate="round-alone"))
    folded = {"ranks": 4, "mesh": "dp=2,tp=2", "experts": "ep=2,etp=2", "steps": 1}
    faults += [VerifySpec.of(**folded, mutate=name) for name in ("skip-tp-sum", "skip-tp-gather", "drop-etp-shard")]
    faults += [sequences_of(4, "moetrain", mutate=name) for name in IN_SUMS]
    faults.append(sequences_of(2, "moetrain", mutate="stale-offload", offload=1.0))
    faults.append(sequences_of(3, "context", mutate="local-lse", activation_checkpoint=True))
    return faults


def test_another_plan_is_refused_on_every_rank(pools: RankPools) -> None:
    """By step and hash, before anything is computed."""
    report = verify(sequences_of(3, "moetrain", mutate="plan-differs"), pools)
    assert report.error is not None
    told = re.findall(r"step 0: all ranks must have one plan of sequences, but rank 2 has \w{16}", report.error)
    assert len(told) == 3
    assert all(f"rank {rank} failed" in report.error for rank in range(3))


def all_mutants() -> list[VerifySpec]:
    """In float32, whose tolerance could hide more."""
    return [
        spec_of(ranks, ep, num_experts=num_experts, router=router, steps=1, mutate=name)
        for ranks, ep in LAYOUTS
        for num_experts, router in itertools.product((8, 6), ("softmax", "sigmoid"))
        for name in faults_of(ranks, ep)
    ]


def assert_noticed(spec: VerifySpec, pools: RankPools) -> None:
    report = verify(spec, pools)
    assert report.error is None
    assert not report.ok
    assert report.max_rel_error_grad > 10 * report.tolerance, tell(report)


def fault_id(spec: VerifySpec) -> str:
    run = spec.run
    model = (spec.dtype, run.moe.num_experts, run.router.score, spec.rows)
    parts = (spec.mutate, spec.ranks, spec.experts, spec.mesh, *model)
    return "-".join(map(str, parts))


@pytest.mark.parametrize("spec", mutants(), ids=fault_id)
def test_faults_are_noticed(spec: VerifySpec, pools: RankPools) -> None:
    assert_noticed(spec, pools)


@pytest.mark.slow
@pytest.mark.parametrize("spec", all_mutants(), ids=fault_id)
def test_every_fault_is_noticed_everywhere(spec: VerifySpec, pools: RankPools) -> None:
    assert_noticed(spec, pools)


def test_the_command_reports_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "out.json"
    assert main(["--ranks", "2", "--mesh", "dp=2", "--experts", "ep=2", "--steps", "1", "--json", str(path)]) == 0
    assert "equal to the oracle within 1e-05, 1 of 1 steps" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["ok"] is True
    assert written["error"] is None
    assert 0 < written["max_rel_error_grad"] <= 1e-5
    assert 0 <= written["max_rel_error_loss"] <= 1e-5
    assert 0 < written["max_rel_error_param"] <= 1e-5
    assert "layers.1.moe.experts.w_in" in written["steps"][0]["grads"]
    assert (written["mesh"]["ep"], written["mesh"]["edp"], written["spec"]["ranks"]) == (2, 1, 2)
    assert written["versions"]["moetrain"]
    assert [entry.name for entry in path.parent.iterdir()] == ["out.json"]


def test_the_command_reports_a_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    assert main(["--mutate", "scale-weight", "--steps", "1", "--json", str(path)]) == 1
    assert "NOT equal to the oracle" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["ok"] is False
    assert written["max_rel_error_grad"] > 1e-5


def pid(rank: int) -> int:
    return os.getpid()


def test_a_failing_rank_is_told_and_its_pool_replaced(pools: RankPools, tmp_path: Path) -> None:
    before = pools.run(2, pid)
    with pytest.raises(RunFailedError, match=r"rank \d failed to run the case: (?s:.*)missing\.pt"):
        measure([(spec_of(2, 2), tmp_path / "missing.pt")], pools)
    assert not {*before} & {*pools.run(2, pid)}
    assert verify(spec_of(2, 2, steps=1), pools).ok


def test_silent_ranks_say_where_they_stand(tmp_path: Path) -> None:
    """Both wait for what nobody writes."""
    os.mkfifo(tmp_path / "never")
    told = r"rank\(s\) 0, 1 of 2 did not answer within 2 s"
    with RankPools(timeout_s=2.0) as pools, pytest.raises(RunFailedError, match=told) as caught:
        measure([(spec_of(2, 2), tmp_path / "never")], pools)
    assert "raise --timeout on a slow machine" in str(caught.value)
    _, first, second = re.split(r"rank \d stood at:", str(caught.value))
    assert "in run_cases\n" in first
    assert "in run_cases\n" in second


def test_ranks_whose_sets_are_ordered_differently_agree() -> None:
    """Forked ranks have one hash seed, so only spawned ones show what depends on the order of a set of names."""
    spec = VerifySpec.of(ranks=4, mesh="dp=2,tp=2", experts="ep=2,etp=2", steps=1, router="sigmoid")
    with RankPools(timeout_s=100.0, start="spawn") as pools:
        report = verify(spec, pools)
    assert report.ok, tell(report)


def test_engines_of_earlier_cases_leave_no_threads_behind() -> None:
    """Each group of a folding has three threads, which wake now and then as long as anything refers to the group."""
    spec = VerifySpec.of(ranks=4, mesh="dp=2,tp=2", experts="ep=2,etp=2", steps=1)
    with RankPools(timeout_s=100.0) as pools:
        workers = pools.run(4, pid)
        for _ in range(5):
            assert verify(spec, pools).ok
        deadline = time.monotonic() + 20.0  # they are freed after the answer was sent
        while (threads := max(map(threads_of, workers))) > MOST_THREADS and time.monotonic() < deadline:
            time.sleep(0.05)
    assert threads <= MOST_THREADS


MOST_THREADS = 1 + 3 * 4  # the default group's, and of one case those of three more


def threads_of(process: int) -> int:
    """All but those of autograd, which torch starts for as many devices as its build might have: once, for good."""
    count = 0
    for thread in Path(f"/proc/{process}/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            count += not (thread / "comm").read_text().startswith("pt_autograd")
    return count


def test_the_command_reports_a_run_that_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.json"
    assert main(["--timeout", "0.01", "--steps", "1", "--json", str(path)]) == 1
    assert "rank(s) 0 of 1 did not answer within 0.01 s" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["ok"] is False
    assert "rank(s) 0 of 1 did not answer within 0.01 s" in written["error"]
    assert written["max_rel_error_loss"] is None
