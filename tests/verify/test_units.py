"""What `moetrain verify` does before and after the parallel run. Shapes: S tokens of a row."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from moetrain.cli import verify as command
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.sequence import pack_item, plan_data
from moetrain.verify import compare
from moetrain.verify import expected as verify_expected
from moetrain.verify.batches import Domains, Rows, make_rows, oracle_batches, table_of_rows
from moetrain.verify.errors import StepErrors, relative_error, scales_of
from moetrain.verify.expected import expect, load_expected, save_expected
from moetrain.verify.faults import FAULTS
from moetrain.verify.layouts import Layout
from moetrain.verify.mutations import MUTATIONS
from moetrain.verify.report import VerifyReport
from moetrain.verify.spec import VerifySpec


def no_process(*args: object, **options: object) -> NoReturn:
    raise AssertionError("a process would have been started")


@pytest.mark.parametrize(
    ("actual", "expected", "largest", "error"),
    [
        ([1.0, 2.0], [1.0, 2.5], 0.0, 0.2),
        ([0.0], [0.01], 10.0, 0.1),  # a small tensor of a model with large gradients
        ([0.0], [0.0], 0.0, 0.0),
        ([1e-9], [0.0], 0.0, math.inf),
        ([1e-9], [0.0], 1.0, 1e-7),
        ([math.nan], [1.0], 1.0, math.inf),
        ([1.0], [math.nan], 1.0, math.inf),
        ([math.inf], [math.inf], 1.0, math.inf),
        ([1.0, 2.0], [1.0], 1.0, math.inf),
        ([], [], 1.0, 0.0),
    ],
)
def test_relative_error(actual: list[float], expected: list[float], largest: float, error: float) -> None:
    a, b = (torch.tensor(values, dtype=torch.float64) for values in (actual, expected))
    assert relative_error(a, b, largest) == pytest.approx(error, rel=1e-12)


def test_scales_are_of_the_tensor_or_a_hundredth_of_the_largest() -> None:
    tensors = {"large": torch.tensor([-50.0, 1.0]), "small": torch.tensor([0.1]), "none": torch.empty(0)}
    assert scales_of(tensors) == {"large": 50.0, "small": 0.5, "none": 0.5}


def test_what_is_expected_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "expected.pt"
    expected = expect(VerifySpec.of(steps=2, rows=3, dense_first=0))
    save_expected(expected, path)
    loaded = load_expected(path)
    for step, back in zip(expected.steps, loaded, strict=True):
        for kind, tensors in (("before", step.before), ("after", step.oracle.params), ("grads", step.oracle.grads)):
            assert back[kind].keys() == tensors.keys()
            assert all(torch.equal(back[kind][name], tensors[name]) for name in tensors), kind
        assert [row.id for row in back["rows"]] == [row.id for row in step.rows]
        assert all(torch.equal(a.target_T, b.target_T) for a, b in zip(back["rows"], step.rows, strict=True))
        assert back["loss"] == step.oracle.loss
    assert torch.equal(loaded[1]["lagged_count_LE"], loaded[0]["count_LE"])
    assert not loaded[0]["lagged_count_LE"].any()


def test_one_step_alone_starts_from_drawn_loads() -> None:
    cold, warm = (expect(VerifySpec.of(steps=steps, rows=2, router="sigmoid")).steps[0] for steps in (2, 1))
    assert not any(count_E.any() for count_E in cold.balance.lagged_count_E.values())
    assert all(count_E.any() for count_E in warm.balance.lagged_count_E.values())
    assert all(bias_E.any() for bias_E in warm.balance.bias_E.values())
    assert cold.oracle.aux != warm.oracle.aux
    softmax = expect(VerifySpec.of(steps=1, rows=2)).steps[0]
    assert not any(bias_E.any() for bias_E in softmax.balance.bias_E.values())


def step_errors(**changes: object) -> StepErrors:
    right = {"loss": 0.0, "aux": 0.0, "grad_norm": 0.0, "grads": {"w": 1e-6}, "params": {"w": 1e-7}}
    return StepErrors(**{**right, "bias": 0.0, "wrong_counts": 0, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": 2e-5},
        {"aux": 2e-5},
        {"grad_norm": 2e-5},
        {"grads": {"v": 0.0, "w": 2e-5}},
        {"grads": {"w": math.inf}},
        {"params": {"w": 2e-5}},
        {"bias": 2e-5},
        {"wrong_counts": 1},
    ],
)
def test_one_error_beyond_tolerance_is_enough(changes: dict[str, Any]) -> None:
    spec = VerifySpec.of(steps=2)
    assert VerifyReport(spec, (step_errors(), step_errors())).ok
    report = VerifyReport(spec, (step_errors(), step_errors(**changes)))
    assert not report.ok
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["ok"] is False


def test_a_run_that_did_not_finish_is_not_ok() -> None:
    assert not VerifyReport(VerifySpec.of(steps=2), (step_errors(),)).ok
    assert not VerifyReport(VerifySpec.of(steps=1), (step_errors(),), error="rank 1 died").ok


def test_the_worst_rank_counts() -> None:
    worst = StepErrors.worst([step_errors(loss=0.5), step_errors(grads={"w": 0.25, "x": 0.125})])
    assert (worst.loss, worst.grads) == (0.5, {"w": 0.25, "x": 0.125})


REFUSALS = [
    (
        ["--ranks", "2", "--mesh", "dp=4"],
        "must multiply to --ranks 2, but 'dp=4' gives 4",
        "--mesh dp=2 --experts ep=1,edp=2",
    ),
    (["--ranks", "4", "--mesh", "dp=4", "--experts", "ep=3"], "a divisor of --ranks 4, but 'ep=3'", "ep=4,edp=1"),
    (["--ranks", "4", "--mesh", "dp=4", "--experts", "ep=2,edp=1"], "gives 2", "ep=2,edp=2"),
    (["--ranks", "2"], "'nothing' gives 1, since an unnamed axis is 1", "--mesh dp=2"),
    (["--ranks", "2", "--mesh", "pp=2"], "mesh.pp = 2 is not built yet", "--mesh dp=2"),
    (["--ranks", "5", "--mesh", "tp=5"], "mesh.tp (5) must divide model.num_heads (24)", "one of 3, 4, 6"),
    (["--ranks", "7", "--mesh", "tp=7"], "mesh.tp (7) must divide", "of --ranks 7: --mesh dp=7 --experts ep=1,edp=7"),
    (["--ranks", "5", "--mesh", "dp=5", "--experts", "etp=5"], "mesh.etp (5) must divide moe.expert_width", "one of"),
    (["--ranks", "2", "--mesh", "dp=2", "--experts", "pp=2"], "unknown axis 'pp'", "edp, ep, etp"),
    (["--mesh", "dq=2"], "unknown axis 'dq'", "legal axes are"),
    (["--mesh", "dp=two"], "whole number", "dp=2"),
    (["--ranks", "0"], "--ranks must be at least 1", "got 0"),
    (["--ranks", "many"], "invalid int value", "--help"),
    (["--steps", "0"], "--steps must be at least 1", "got 0"),
    (["--rows", "0"], "--rows must be at least 1", "got 0"),
    (["--top-k", "9"], "moe.top_k (9)", "moe.num_experts (8)"),
    (["--optimizer", "adam"], "optim.name must be one of", "did you mean 'adamw'"),
    (["--dtype", "bfloat16"], "--dtype must be one of", "'float32'"),
    (["--router", "sofmax"], "did you mean 'softmax'", "router.score"),
    (["--mutate", "drop"], "--mutate must be one of", "drop-holder"),
    (["--mutate", "drop-holder"], "more than one holder", "edp is 1"),
    (["--ranks", "2", "--mesh", "dp=2", "--experts", "ep=2", "--mutate", "average"], "more than one holder", "edp"),
    (["--mutate", "wrong-group"], "ranks that see different rows", "--ranks 2"),
    (["--mutate", "skip-tp-sum"], "needs tensor parallelism, but tp is 1", "--mesh tp=2"),
    (["--mutate", "drop-etp-shard"], "needs experts in shards, but etp is 1", "--experts etp=2"),
    (["--capacity-factor", "0"], "dispatch.capacity_factor must be positive", "1.25 is usual"),
    (["--mutate", "round-alone"], "needs ranks that round together", "ep of 2 or more"),
    (["--rounding", "nearby"], "dispatch.rounding must be one of", "nearest"),
    (["--tile", "0"], "dispatch.tile must be between 1 and 65536", "got 0"),
    (["--timeout", "0"], "--timeout must be above 0", "120"),
    (["--num-groups", "3"], "router.num_groups (3) must divide", "routing without groups"),
    (["--no-such-option"], "unknown option --no-such-option", "--help"),
    (["--preset", "tiny"], "unknown option --preset", "--help"),
    (["--mesh.tp", "2"], "--mesh.tp does not apply here", "model, moe, router"),
    (["--train.steps", "2"], "--train.steps does not apply here", "--help"),
    (["--moe.top_kk", "2"], "unknown option --moe.top_kk", "did you mean --moe.top-k?"),
    (["--num-experts", "many"], "moe.num_experts must be int, got 'many'", "a whole number such as 4"),
]


@pytest.mark.parametrize(("arguments", "what", "cure"), REFUSALS)
def test_refusals_come_before_any_process(
    arguments: list[str],
    what: str,
    cure: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(compare, "RankPools", no_process)
    path = tmp_path / "out.json"
    assert command.main([*arguments, "--json", str(path)]) == 2
    complaint = capsys.readouterr().err
    assert what in complaint
    assert cure in complaint
    written = json.loads(path.read_text())
    assert written["ok"] is False
    assert what in written["error"]
    assert written["max_rel_error_grad"] is None


def layout_of(ranks: int, **nodes: Any) -> Layout:
    return Layout(ranks=ranks, mesh="", experts="", num_heads=24, expert_width=24, **nodes)


def test_nearest_layouts_keep_what_can_be_kept() -> None:
    assert layout_of(4).nearest({"ep": 3, "dp_replicate": 2})[0] == (
        "--mesh dp_replicate=2,dp=2 --experts ep=4,edp=1"  # 4 is nearer to 3 than 2, as a ratio
    )
    assert layout_of(1).nearest({"ep": 2}) == ["--mesh dp=1 --experts ep=1,edp=1"]


@pytest.mark.parametrize(
    "wanted", [{"tp": 7}, {"tp": 16, "ep": 16}, {"etp": 16}, {"ep": 5, "etp": 5}, {"dp_replicate": 3}]
)
def test_nearest_layouts_are_accepted(wanted: dict[str, int]) -> None:
    """On five ranks tp = 5 would fit them, but not the 24 heads."""
    for ranks in range(1, 21):
        layouts = layout_of(ranks).nearest(wanted)
        assert len(layouts) >= 1
        for layout in layouts:
            _, mesh, _, experts = layout.split()
            assert VerifySpec.of(ranks=ranks, mesh=mesh, experts=experts).run.mesh.resolve(ranks)


@pytest.mark.parametrize("per_node", [1, 2, 3, 4, 8])
def test_nearest_layouts_take_two_levels_where_they_are_asked_for(per_node: int) -> None:
    """Whether or not what was asked for is among them."""
    num_refused = 0
    for ranks, ep in ((6, 6), (6, 3), (8, 8), (8, 4), (12, 6)):
        given = {"ranks": ranks, "two_level": True, "ranks_per_node": per_node}
        nodes = layout_of(ranks, two_level=True, ranks_per_node=per_node)
        layouts = nodes.nearest({"dp_shard": ranks, "ep": ep})
        for layout in layouts:
            _, mesh, _, experts = layout.split()
            assert VerifySpec.of(**given, mesh=mesh, experts=experts).run.mesh.two_level
        wanted = FoldedMesh(dp_shard=ranks, ep=ep, edp=ranks // ep, ranks_per_node=per_node)
        asked = f"--mesh dp={ranks} --experts ep={ep},edp={ranks // ep}"
        assert (layouts[0] == asked) is (asked in layouts) is wanted.has_equal_nodes
        if not wanted.has_equal_nodes:
            num_refused += 1
            with pytest.raises(ValueError, match="as many ranks on each of their nodes") as refusal:
                VerifySpec.of(**given, mesh=f"dp={ranks}", experts=f"ep={ep}")
            assert str(refusal.value).endswith("; ".join(layouts))
    assert (num_refused > 0) is (per_node > 1)


def test_two_levels_that_are_one_are_told() -> None:
    def on_nodes_of(ranks: int) -> VerifySpec:
        return VerifySpec.of(ranks=8, mesh="dp=8", experts="ep=8", two_level=True, ranks_per_node=ranks)

    assert "in ONE level, though --two-level is given: the 8 rank(s) of each ep group are on one node" in (
        on_nodes_of(8).two_levels_in_words()
    )
    assert "are on as many nodes" in on_nodes_of(1).two_levels_in_words()
    assert on_nodes_of(4).two_levels_in_words() == "in two levels: 2 nodes of 4 ranks in each ep group"
    report = VerifyReport(on_nodes_of(4)).to_json()
    assert report["dispatch"] == "in two levels: 2 nodes of 4 ranks in each ep group"


def test_every_named_mutation_can_apply() -> None:
    for mutation in MUTATIONS:
        of_mutation: dict[str, dict[str, Any]] = {
            "round-alone": {"rounding": "nearest", "experts": "ep=2"},
            "skip-tp-sum": {"mesh": "tp=2"},
            "skip-tp-gather": {"mesh": "tp=2"},
            "drop-etp-shard": {"experts": "etp=2"},
            "drop-seat": {"placement": "moetrain"},
            "stale-plan": {"placement": "moetrain"},
            "swap-owners": {"placement": "full", "move_owners": True},
            "lose-moment": {"placement": "full", "move_owners": True, "optimizer": "adamw", "steps": 2},
            "scale-by-rank": {"sequence": "data"},
            "plan-differs": {"sequence": "data"},
            "stale-offload": {"sequence": "data", "offload": 0.5},
        }
        for of_gangs in ("local-lse", "drop-ring-step", "local-positions", "swap-parts"):
            of_mutation[of_gangs] = {"sequence": "moetrain"}
        needs = of_mutation.get(mutation, {})
        assert VerifySpec.of(**{"ranks": 2, "mesh": "dp=2", "mutate": mutation, **needs}).mutate == mutation


def test_every_mutation_has_its_fault() -> None:
    assert FAULTS.keys() == MUTATIONS.keys()


def test_any_field_of_the_model_may_be_changed() -> None:
    """By its short name or its own; what it implies yields to what is said."""
    spec = VerifySpec.of(ranks=2, mesh="dp=2", router="sigmoid", **{"moe.shared_width": 7, "moe.num_shared_experts": 0})
    assert (spec.run.router.score, spec.run.balance.loss_free, spec.run.router.weight_scale) == ("sigmoid", True, 2.5)
    assert (spec.run.moe.shared_width, spec.run.moe.shared_gate) == (7, False)
    assert (spec.run.moe.num_experts, spec.run.model.num_layers, spec.run.mesh.dp_shard) == (8, 3, 2)
    assert spec == VerifySpec.of(
        mesh="dp=2", **{"moe.num_shared_experts": 0, "moe.shared_width": 7, "router.score": "sigmoid"}, ranks=2
    )
    assert spec != replace(spec, seed=1)
    said = VerifySpec.of(router="sigmoid", **{"router.weight_scale": 1.0, "balance.loss_free": False})
    assert (said.run.router.weight_scale, said.run.balance.loss_free) == (1.0, False)
    assert VerifySpec.of(rounding="up").run.model.vocab_size > VerifySpec().run.model.vocab_size
    adam = VerifySpec.of(optimizer="adamw", **{"optim.lr": 0.5})
    assert (adam.num_steps, adam.run.optim.lr, adam.run.optim.eps) == (1, 0.5, 1e-3)


def test_the_command_takes_fields_by_both_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[VerifySpec] = []

    def answer(spec: VerifySpec, *, timeout_s: float) -> VerifyReport:
        asked.append(spec)
        return VerifyReport(spec, error="not run")

    monkeypatch.setattr(command, "verify", answer)
    options = ["--ranks", "2", "--mesh", "dp=2", "--top-k", "3", "--two-level", "--ranks-per-node=1", "--rows", "5"]
    options += ["--router.renormalise", "false", "--pad-to-capacity", "--capacity-factor=1.5", "--seed", "7"]
    assert command.main(options) == 1
    fields = {"top_k": 3, "two_level": True, "ranks_per_node": 1, "pad_to_capacity": True, "capacity_factor": 1.5}
    assert asked == [VerifySpec.of(ranks=2, mesh="dp=2", rows=5, seed=7, **fields, **{"router.renormalise": False})]


def test_rows_are_awkward() -> None:
    rows = [row for step in range(4) for row in make_rows(7, step, 8, seq_len=16, vocab_size=61)]
    assert len({row.id for row in rows}) == len(rows)
    lengths = [len(document.token_id_S) for row in rows for document in row.documents()]
    loss_tokens = {int((row.target_T >= 0).sum()) for row in rows}
    assert min(lengths) == 1
    assert max(lengths) > 8
    assert len(loss_tokens) > 6
    assert {len(row.token_id_T) for row in rows} == set(range(12, 17))
    assert max(len(row.documents()) for row in rows) >= 3


def test_oracle_and_parallel_run_see_the_same_tokens() -> None:
    rows = make_rows(1, 0, 5, seq_len=16, vocab_size=61)
    plan, by_id = plan_data(table_of_rows(rows), 2, 2), Rows(rows)
    lanes = [(rank, round_idx) for round_idx in range(plan.num_rounds(0)) for rank in range(2)]
    batches = [pack_item(plan, plan.item_at(rank, round_idx), rank, by_id) for rank, round_idx in lanes]
    assert [len({piece.sequence for piece in batch.pieces}) for batch in batches] == [2, 2, 1, 0]
    for batch, micro_batch in zip(batches, oracle_batches(plan, by_id), strict=False):
        assert batch.num_tokens == micro_batch.num_tokens
        assert batch.num_loss_tokens == micro_batch.num_loss_tokens
        tokens = torch.cat([document.token_id_S for document in micro_batch.documents])
        assert tokens.tolist() == batch.token_id_T.tolist()
        targets = torch.cat([document.target_S for document in micro_batch.documents])
        assert targets.tolist() == batch.target_T.tolist()
    assert sum(batch.num_tokens for batch in batches) == plan.num_tokens


def test_ranks_that_round_together_are_one_domain_of_the_oracle() -> None:
    rows = make_rows(1, 0, 5, seq_len=16, vocab_size=61)
    plan, by_id = plan_data(table_of_rows(rows), 2, 2), Rows(rows)
    apart, joined = oracle_batches(plan, by_id), oracle_batches(plan, by_id, Domains(1, {0: 0, 1: 0}))
    assert [batch.round_idx for batch in joined] == [0, 1]
    assert joined[0].rank_documents == tuple(len(batch.documents) for batch in apart[:2])
    assert joined[0].rank_tokens == [batch.num_tokens for batch in apart[:2]]
    tokens, expected = (
        [document.token_id_S.tolist() for batch in batches for document in batch.documents]
        for batches in (joined[:1], apart[:2])
    )
    assert tokens == expected
    assert joined[1].rank_tokens == [apart[2].num_tokens]
    assert {domain for batch in joined for domain in batch.domain_T or ()} == {0}
    spec = VerifySpec.of(ranks=4, mesh="dp=4", experts="ep=2", rounding="up")
    assert spec.domains() == Domains(1, {0: 0, 1: 0, 2: 1, 3: 1})
    assert VerifySpec.of(ranks=2, mesh="dp=2", experts="ep=2").domains() is None


def test_places_of_a_row_are_shared_by_the_ranks_of_its_lane() -> None:
    """Two lanes of two ranks; a rank has the first or the second half of its lane's tokens."""
    rows = make_rows(1, 0, 2, seq_len=16, vocab_size=61)
    plan, by_id = plan_data(table_of_rows(rows), 2, 1), Rows(rows)
    (batch,) = oracle_batches(plan, by_id, Domains(2, {rank: rank for rank in range(4)}))
    halves = [-(-len(row.token_id_T) // 2) for row in rows]
    assert batch.domain_slots == (halves[0], halves[0], halves[1], halves[1])
    assert len(set(halves)) == 2
    want = [2 * lane + place // halves[lane] for lane, row in enumerate(rows) for place in range(len(row.token_id_T))]
    assert batch.domain_T == tuple(want)
    assert len(set(want)) == 4
    spec = VerifySpec.of(ranks=4, mesh="dp=2,tp=2", experts="ep=2", capacity_factor=1.0)
    assert spec.domains() == Domains(2, {0: 0, 1: 1, 2: 2, 3: 3})


def test_seeds_with_near_ties_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = VerifySpec.of(steps=1, rows=1, accumulation=1)
    gaps = [expect(spec.with_seed(seed)).steps[0].oracle.gap for seed in range(8)]
    bar = sorted(gaps)[4]
    monkeypatch.setitem(verify_expected.NARROWEST_GAP, "float32", bar)
    expected = expect(spec)
    assert expected.spec.seed == next(seed for seed, gap in enumerate(gaps) if gap >= bar)
    assert expected.skipped_seeds == tuple(range(expected.spec.seed))


def test_seeds_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verify_expected.NARROWEST_GAP, "float32", 1e9)
    monkeypatch.setattr(verify_expected, "MOST_SEEDS", 2)
    with pytest.raises(ValueError, match="each of the 2 seeds from 5 on has a routing decision closer"):
        expect(VerifySpec.of(steps=1, rows=1, seed=5))


def test_no_seed_helps_where_all_tokens_score_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_expected, "MOST_SEEDS", 2)
    with pytest.raises(ValueError, match="rounded by weight, more experts and top_k above 1"):
        expect(VerifySpec.of(steps=1, dtype="float64", num_experts=1, top_k=1, rounding="nearest"))


def test_each_step_starts_from_what_the_parallel_run_can_represent() -> None:
    first, second = expect(VerifySpec.of(steps=2, rows=1)).steps
    assert first.before["embed.weight"].dtype == torch.float32
    assert torch.equal(second.before["embed.weight"], first.oracle.params["embed.weight"].float())
    assert first.oracle.grads["embed.weight"].dtype == torch.float64


@pytest.mark.parametrize(("dtype", "later"), [("float32", False), ("float64", True)])
def test_adamw_compares_parameters_of_later_steps_in_double_alone(dtype: str, later: bool) -> None:
    assert VerifySpec.of(optimizer="adamw").num_steps == 1
    steps = expect(VerifySpec.of(optimizer="adamw", steps=2, rows=1, dtype=dtype)).steps
    assert [step.compare_params for step in steps] == [True, later]


def test_a_folder_is_no_place_for_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "RankPools", no_process)
    assert command.main(["--json", str(tmp_path)]) == 2
    assert "is a folder; add a file name" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
