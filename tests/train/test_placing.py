"""Training while experts move: what no plan may change, what a checkpoint restores, and what stops a run."""

import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from known import world_group
from layer_configs import layer_config
from placement.placements import same as same_placement
from ranks import run_on_ranks
from torch import Tensor
from train.tiny_run import do_step, make_engine, make_run

from moetrain.checkpoint.folder import find_latest
from moetrain.config import MeshConfig, OptimConfig, PlacementConfig, RunConfig
from moetrain.data.dataset import PackedDataset
from moetrain.data.loader import RowLoader
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.sequence.data_planner import plan_data
from moetrain.train.engine import Engine
from moetrain.train.evaluate import evaluate
from moetrain.train.placing import PlacementMismatchError, Plan, shuffled_owners
from moetrain.train.placing_state import KEY, LOADS
from moetrain.train.resume import remarks
from moetrain.train.state import load_engine, save_engine

MOVING: dict[str, Any] = {"planner": "moetrain", "slots": 1, "plan_every": "micro_batch"}


def run_of(corpus: Path, mesh: dict[str, Any] | None = None, steps: int = 60, **placement: Any) -> RunConfig:
    run = make_run(corpus, corpus / "unused", steps=steps, mesh=MeshConfig(**(mesh or {"ep": 2})), dtype="float32")
    return replace(run, placement=PlacementConfig(**placement))


def weights_of(engine: Engine) -> dict[str, Tensor]:
    return engine.whole.parameters()


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def owners_body(rank: int, corpus: Path, steps: int, lose: bool) -> tuple[bool, list[bool]]:
    """Owners move before every step of one engine and never in the other; whether weights and losses are equal."""
    run = run_of(corpus, planner="full", slots=0)
    still, moving = (make_engine(run, dist.get_world_size()) for _ in range(2))
    still.take(still.placing.relocate(still.placing.owners()))  # before the first plan experts are where owners are
    losses = []
    for step in range(steps):
        owner_LE = shuffled_owners(moving.placing.owners(), 7, step)
        if lose and step == 3:
            moving.store.owned_parameters()[1].data.mul_(1 + 1e-6)
        moving.take(moving.placing.relocate(owner_LE))
        one, other = do_step(still), do_step(moving)
        losses.append((one.loss, one.aux, one.grad_norm) == (other.loss, other.aux, other.grad_norm))
    return same(weights_of(still), weights_of(moving)), losses


@pytest.mark.dist
def test_moving_owners_changes_no_bit(corpus: Path) -> None:
    for equal, losses in run_on_ranks(2, owners_body, corpus, 50, False):
        assert equal
        assert len(losses) == 50
        assert all(losses)


@pytest.mark.dist
def test_a_millionth_lost_in_a_move_would_show(corpus: Path) -> None:
    for equal, losses in run_on_ranks(2, owners_body, corpus, 6, True):
        assert not equal
        assert not all(losses)


def resumed_body(rank: int, corpus: Path, folder: Path, placement: dict[str, Any], forget: bool) -> list[bool]:
    """Three steps, a checkpoint, three more; against a new engine that loads it and does the last three."""
    run = run_of(corpus, steps=6, move_owners_every=2, **placement)
    whole = make_engine(run, dist.get_world_size())
    for _ in range(3):
        do_step(whole)
    save_engine(whole, folder, world_group())
    again = make_engine(run, dist.get_world_size())
    path = find_latest(folder, world_group())
    assert path is not None
    extra = load_engine(again, path, world_group())
    assert extra[KEY]["num_plans"] > 0
    if forget:
        again.placing.num_plans += 1
        plan = again.placing.plan_again()
        assert plan is not None
        again.placing.take(plan)
    found = [torch.equal(whole.placing.owners(), again.placing.owners())]
    found += [
        same_placement(whole.placing.placed[layer].now, again.placing.placed[layer].now) for layer in whole.store.layers
    ]
    for _ in range(3):
        found.append(do_step(whole).loss == do_step(again).loss)
    return [*found, same(weights_of(whole), weights_of(again))]


@pytest.mark.dist
@pytest.mark.parametrize("planner", ["moetrain", "hecate", "random"])
def test_a_resumed_run_is_the_same_to_the_bit(corpus: Path, tmp_path: Path, planner: str) -> None:
    for found in run_on_ranks(2, resumed_body, corpus, tmp_path, MOVING | {"planner": planner}, False):
        assert all(found)


@pytest.mark.dist
def test_a_run_that_resumes_with_another_plan_would_show(corpus: Path, tmp_path: Path) -> None:
    for found in run_on_ranks(2, resumed_body, corpus, tmp_path, MOVING | {"planner": "random"}, True):
        assert not all(found)


def elsewhere_body(
    rank: int, corpus: Path, folder: Path, mesh: dict[str, Any], placement: dict[str, Any], save: bool
) -> tuple[dict[str, Tensor], list[str], list[bool]]:
    """Save after two steps, or load, and go on a step; weights as saved or loaded."""
    run = run_of(corpus, mesh, steps=6, **placement)
    engine = make_engine(run, dist.get_world_size())
    said: list[str] = []
    if save:
        for _ in range(2):
            do_step(engine)
        save_engine(engine, folder, world_group())
    else:
        path = find_latest(folder, world_group())
        assert path is not None
        extra = load_engine(engine, path, world_group())
        said = remarks(extra, run, engine.groups.mesh)
    weights = weights_of(engine)
    seen = [bool(one.sum() > 0) for one in engine.placing.predictor.state_dict()["seen"]] if run.placement.moves else []
    do_step(engine)
    return weights, said, seen


@pytest.mark.dist
def test_checkpoints_load_under_another_layout_and_planner(corpus: Path, tmp_path: Path) -> None:
    saved, _, _ = run_on_ranks(4, elsewhere_body, corpus, tmp_path, {"ep": 2}, MOVING, True)[0]
    cases: list[tuple[int, dict[str, Any], dict[str, Any], bool]] = [
        (2, {"ep": 2}, MOVING, True),
        (4, {"ep": 4, "ranks_per_node": 2}, MOVING | {"planner": "hecate"}, True),
        (4, {"ep": 4}, {"planner": "moetrain", "slots": 3, "rematerialise": "always"}, False),
        (4, {"ep": 2}, {}, False),
        (1, {"ep": 1}, MOVING, True),
    ]
    for ranks, mesh, placement, says in cases:
        for weights, said, seen in run_on_ranks(ranks, elsewhere_body, corpus, tmp_path, mesh, placement, False):
            assert same(weights, saved)
            assert len(said) == says
            assert all("experts are spread evenly again, and plans start from loads over all" in one for one in said)
            assert seen == ([True] if placement else [])


@pytest.mark.dist
def test_a_run_of_static_experts_may_go_on_with_moving_ones(corpus: Path, tmp_path: Path) -> None:
    saved, _, _ = run_on_ranks(2, elsewhere_body, corpus, tmp_path, {"ep": 2}, {}, True)[0]
    for weights, said, seen in run_on_ranks(2, elsewhere_body, corpus, tmp_path, {"ep": 2}, MOVING, False):
        assert same(weights, saved)
        assert (said, seen) == ([], [])


def mismatch_body(rank: int, corpus: Path, every: str) -> list[str]:
    """In its second plan this rank knows of other loads than the rest; the error, and whether anything was used."""
    mesh = {"ep": dist.get_world_size()}
    engine = make_engine(run_of(corpus, mesh, planner="random", slots=2, plan_every=every), dist.get_world_size())
    do_step(engine)
    before = {layer: one.now for layer, one in engine.placing.placed.items()}
    if rank == 1:
        engine.placing.num_plans += 5
    try:
        do_step(engine)
    except PlacementMismatchError as error:
        unused = all(one.now is before[layer] for layer, one in engine.placing.placed.items())
        return [str(error), str(unused)]
    return ["no error", ""]


@pytest.mark.dist
@pytest.mark.parametrize("every", ["step", "micro_batch"])
def test_plans_that_differ_stop_all_ranks_before_they_are_used(corpus: Path, every: str) -> None:
    for text, unused in run_on_ranks(3, mismatch_body, corpus, every):
        assert "step 1: ranks have planned different placements of layer 1: ranks [0, 2] against ranks [1]" in text
        assert "none has been used" in text
        assert unused == "True"


def unfinished_body(rank: int, corpus: Path, how: str) -> tuple[list[str], bool]:
    """A step that ends in an error after its plan was begun, then what the next one makes of it; errors, and equality
    of weights, loss and counted loads with an engine that never saw that step."""
    mesh = {"ep": dist.get_world_size()}
    run = run_of(corpus, mesh, planner="random", slots=1, move_owners_every=1)
    broken, whole = (make_engine(run, dist.get_world_size()) for _ in range(2))
    said = []
    share = broken.share_gradients

    def fail() -> None:
        raise OSError("the network is gone")

    data = run.data
    loader = RowLoader(PackedDataset(data.path, "train", data.seq_len, run.seed))
    plan = plan_data(loader.sequences_of_step(0, data.global_batch), broken.groups.size("data"), 2)
    mine = broken.lane.rank
    batches = [loader.batch(plan, mine, idx) for idx in range(plan.num_rounds(mine))]
    try:
        if how == "an error behind the backward pass":
            broken.share_gradients = fail  # type: ignore[method-assign]
        broken.step(plan, batches if how != "a micro-batch too many" else [*batches, batches[0]])
    except (OSError, ValueError) as error:
        said.append(str(error))
    broken.share_gradients = share  # type: ignore[method-assign]
    for engine in (broken, whole):
        engine.placing.num_plans = 7  # draw the same plan
    same_loss = do_step(broken).loss == do_step(whole).loss
    assert broken.loads is not None
    assert whole.loads is not None
    same_loads = torch.equal(broken.loads.take_step(), whole.loads.take_step())
    return said, same_loss and same_loads and same(weights_of(broken), weights_of(whole))


@pytest.mark.dist
@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("an error behind the backward pass", "network is gone"),
        ("a micro-batch too many", "but 4 micro-batches came"),
    ],
)
def test_a_step_that_ends_in_an_error_leaves_no_plan_and_no_gradient_behind(corpus: Path, how: str, text: str) -> None:
    for said, equal in run_on_ranks(1, unfinished_body, corpus, how):
        assert len(said) == 1
        assert text in said[0]
        assert equal
    for said, equal in run_on_ranks(2, unfinished_body, corpus, "an error behind the backward pass"):
        assert (len(said), equal) == (1, True)


def uneven_body(rank: int, corpus: Path, folder: Path) -> tuple[list[str], list[int], bool]:
    """Owners moved until a rank has more than padded messages hold; resumed without moving them."""
    padded = layer_config(num_experts=6, top_k=2, expert_width=24, capacity_factor=1.5, pad_to_capacity=True)
    run = run_of(corpus, planner="random", slots=0, move_owners_every=5)
    run = replace(run, dispatch=padded.dispatch, model=replace(run.model, num_layers=3))
    engine = make_engine(run, dist.get_world_size())
    lopsided = torch.tensor([[0, 0, 0, 0, 1, 1], [1, 0, 1, 1, 0, 1]], dtype=torch.int32)
    engine.take(engine.placing.relocate(lopsided))
    do_step(engine)
    save_engine(engine, folder, world_group())
    weights = weights_of(engine)
    again_run = replace(run, placement=replace(run.placement, move_owners_every=0))
    again = make_engine(again_run, dist.get_world_size())
    path = find_latest(folder, world_group())
    assert path is not None
    extra = load_engine(again, path, world_group())
    equal = same(weights_of(again), weights)
    do_step(again)
    return remarks(extra, again_run, again.groups.mesh), again.placing.owners().flatten().tolist(), equal


@pytest.mark.dist
def test_owners_that_messages_have_no_room_for_are_spread_again(corpus: Path, tmp_path: Path) -> None:
    for said, owners, equal in run_on_ranks(2, uneven_body, corpus, tmp_path):
        assert len(said) == 1
        assert "a rank owned more experts of a layer than padded messages have room for" in said[0]
        assert owners == [0, 0, 0, 1, 1, 1] * 2
        assert equal


def skipped_body(rank: int, corpus: Path) -> tuple[bool, bool, bool]:
    """A step whose gradient is not finite; whether owners stayed then, and moved in the next step."""
    engine = make_engine(run_of(corpus, planner="random", slots=1, move_owners_every=1), dist.get_world_size())
    do_step(engine)
    before, share = engine.placing.owners(), engine.share_gradients

    def spoil() -> None:
        share()
        grad = engine.store.owned_parameters()[1].grad
        if grad is not None and rank == 0:
            grad.fill_(float("nan"))

    engine.share_gradients = spoil  # type: ignore[method-assign]
    skipped = do_step(engine).skipped
    stayed = torch.equal(engine.placing.owners(), before)
    engine.share_gradients = share  # type: ignore[method-assign]
    do_step(engine)
    return skipped, stayed, not torch.equal(engine.placing.owners(), before)


@pytest.mark.dist
def test_a_skipped_step_moves_no_owner(corpus: Path) -> None:
    assert run_on_ranks(2, skipped_body, corpus) == [(True, True, True)] * 2


def evaluation_body(rank: int, corpus: Path) -> tuple[int, bool, bool]:
    engine = make_engine(run_of(corpus, **MOVING), dist.get_world_size())
    do_step(engine)
    before = {layer: one.now for layer, one in engine.placing.placed.items()}
    plans = engine.placing.num_plans
    data = engine.run.data
    validation = RowLoader(PackedDataset(data.path, "validation", data.seq_len, engine.run.seed))
    assert evaluate(engine, validation, 4) is not None
    counted = engine.placing._loads
    assert counted is not None
    unused = all(one.now is before[layer] for layer, one in engine.placing.placed.items())
    return engine.placing.num_plans - plans, unused, bool(counted.take().any())


@pytest.mark.dist
def test_evaluation_neither_plans_nor_counts(corpus: Path) -> None:
    assert run_on_ranks(2, evaluation_body, corpus) == [(0, True, False)] * 2


def alike_body(rank: int, corpus: Path, cases: list[dict[str, Any]]) -> list[list[float]]:
    """Losses of the same steps however experts are placed."""
    found = []
    for case in cases:
        run = replace(run_of(corpus, **case), optim=OptimConfig(warmup_steps=2, name="adamw"))
        engine = make_engine(run, dist.get_world_size())
        found.append([do_step(engine).loss for _ in range(4)])
    return found


@pytest.mark.dist
def test_no_placement_changes_what_is_learnt(corpus: Path) -> None:
    cases: list[dict[str, Any]] = [
        {},
        MOVING,
        MOVING | {"rematerialise": "always"},
        MOVING | {"plan_every": "step"},
        {"planner": "full"},
        {"planner": "random", "move_owners_every": 1},
    ]
    for static, moving, again, *others in run_on_ranks(2, alike_body, corpus, cases):
        assert moving == again, "weights that are gathered again are the same"
        for other in (moving, *others):
            assert other == pytest.approx(static, rel=2e-6)


def test_plans_have_digests_that_fit_two_numbers() -> None:
    plans = [Plan(1, {}, (), None).digest() for _ in range(2)]
    assert plans[0] == plans[1]
    assert 0 <= plans[0] < 2**63


def test_a_checkpoints_names_say_what_loads_are() -> None:
    assert f"{LOADS}.0".startswith(KEY)
    mesh = FoldedMesh(dp_shard=4, ep=4, ranks_per_node=2)
    assert remarks({}, RunConfig(placement=PlacementConfig(planner="full")), mesh) == []


def growth_body(rank: int, corpus: Path) -> list[int]:
    """Peak memory of the process after so many steps with a new plan each, in kilobytes."""
    engine = make_engine(run_of(corpus, steps=500, planner="random", slots=2, move_owners_every=1), 2)
    found = []
    for step in range(1, 401):
        do_step(engine)
        if step in (100, 400):
            found.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return found


@pytest.mark.dist
@pytest.mark.slow
def test_memory_does_not_grow_with_plans(corpus: Path) -> None:
    for early, late in run_on_ranks(2, growth_body, corpus, timeout=300):
        assert late <= 1.02 * early
