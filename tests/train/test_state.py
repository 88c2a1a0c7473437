"""Saved on two ranks, loaded on any number: gathered parameters and moments are equal to the bit."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from known import world_group
from layer_configs import layer_config
from ranks import run_on_ranks
from torch import Tensor
from train.tiny_run import do_step, make_engine, make_run

from moetrain.checkpoint.folder import find_latest
from moetrain.checkpoint.manifest import Manifest
from moetrain.config import MeshConfig, RunConfig
from moetrain.placement.chunks import ExpertShape
from moetrain.train.engine import Engine
from moetrain.train.grad_norm import counts
from moetrain.train.optimizer import MOMENTS, num_updates, set_num_updates
from moetrain.train.state import load_engine, save_engine
from moetrain.verify.product.cases import foldings

State = dict[str, Tensor]


def run_of(corpus: Path, mesh: dict[str, Any], **options: Any) -> RunConfig:
    """Every kind of parameter and of balancing state."""
    shared = {"num_shared_experts": 1, "shared_gate": True}
    layer = layer_config(num_experts=6, top_k=2, expert_width=24, score="sigmoid", loss_free=True, **shared, **options)
    return make_run(corpus, corpus / "unused", steps=10, mesh=MeshConfig(**mesh), layer=layer)


def with_heads(run: RunConfig) -> RunConfig:
    """With key heads that tp of 2, 3, 4 and 6 cut, and of 8 does not."""
    return replace(run, model=replace(run.model, num_heads=24, num_kv_heads=12, head_dim=4))


def everything(engine: Engine) -> State:
    """Parameters, both moments and balancing state, gathered."""
    state = {f"param.{name}": value for name, value in engine.whole.parameters().items()}
    optimizer_state = engine.optimizer.state
    for moment in MOMENTS:
        for shard in engine.dense:
            local = optimizer_state[shard.value][moment] if shard.value.numel() else shard.local()
            full = torch.zeros(shard.shape, dtype=local.dtype)
            if shard.value.numel() and counts(shard, engine.groups.mesh, engine.groups.rank):
                full[shard.region(local)] = local
            dist.all_reduce(full)
            state[f"{moment}.{shard.name}"] = full
        for shard in engine.experts:
            assert shard.expert_layer is not None
            owned = optimizer_state[shard.value][moment] if shard.value.numel() else shard.local()
            experts = engine.store.full_expert(shard.expert_layer, {shard.expert_layer: owned})
            state.update({f"{moment}.{shard.name}.{expert}": value for expert, value in experts.items()})
    balance = engine.balance.state_dict()
    return state | {f"balance.{layer}.{name}": value for layer in balance for name, value in balance[layer].items()}


def save_body(rank: int, corpus: Path, folder: Path, mesh: dict[str, int] | None = None) -> tuple[State, float]:
    engine = make_engine(with_heads(run_of(corpus, {"ep": 2} if mesh is None else mesh)), dist.get_world_size())
    for _ in range(3):
        do_step(engine)
    save_engine(engine, folder, world_group())
    state = everything(engine)
    return state, do_step(engine).loss


def load_body(
    rank: int, corpus: Path, folder: Path, mesh: dict[str, int], saved_on: int
) -> tuple[State, float, int, float]:
    engine = make_engine(with_heads(run_of(corpus, mesh)), dist.get_world_size())
    path = find_latest(folder, world_group())
    assert path is not None
    extra = load_engine(engine, path, world_group())
    assert extra["next_row"] == 18
    assert extra["world_size"] == saved_on
    updates = num_updates(engine.optimizer)
    state = everything(engine)
    return state, do_step(engine).loss, engine.num_steps_done, updates


Layouts = list[tuple[int, dict[str, int]]]
# By what saves, what loads; numbers of ranks stand together so that pools of ranks need not be started again.
LOADED_ON: list[tuple[int, dict[str, int], Layouts]] = [
    (2, {"ep": 2}, [(1, {}), (2, {"tp": 2, "etp": 2}), (3, {"etp": 3}), (5, {"ep": 5})]),
    (4, {"tp": 2, "etp": 2}, [(4, {"ep": 4}), (4, {"dp_replicate": 2}), (4, {"tp": 2, "ep": 2, "etp": 2})]),
    (8, {"tp": 8, "ep": 4, "etp": 2}, [(4, {"tp": 4}), (8, {"dp_replicate": 2, "tp": 2, "ep": 2, "etp": 4})]),
    (
        6,
        {"dp_replicate": 3, "tp": 2, "ep": 2, "etp": 3},
        [(6, {"tp": 2, "ep": 3}), (6, {"tp": 3, "ep": 2}), (7, {"dp_replicate": 7, "ep": 7})],  # one has no expert
    ),
]
ALL_LAYOUTS = [layout for ranks, mesh, others in LOADED_ON for layout in ((ranks, mesh), *others)]


def check_loading(ranks: int, mesh: dict[str, int], others: Layouts, corpus: Path, folder: Path) -> None:
    saved, next_loss = run_on_ranks(ranks, save_body, corpus, folder, mesh)[0]
    assert any(value.abs().sum() > 0 for name, value in saved.items() if name.startswith("exp_avg_sq.layers.1.moe"))
    for world_size, other in others:
        for state, loss, steps, updates in run_on_ranks(world_size, load_body, corpus, folder, other, ranks):
            assert (steps, updates) == (4, 3)
            assert state.keys() == saved.keys()
            different = [name for name in saved if not torch.equal(state[name], saved[name])]
            assert different == []
            assert loss == pytest.approx(next_loss, rel=1e-5)
            if (world_size, other) == (ranks, mesh):
                assert loss == next_loss


@pytest.mark.dist
@pytest.mark.parametrize(("ranks", "mesh", "others"), LOADED_ON)
def test_loads_under_another_mesh_bit_for_bit(
    ranks: int, mesh: dict[str, int], others: Layouts, corpus: Path, tmp_path: Path
) -> None:
    check_loading(ranks, mesh, [(ranks, mesh), *others], corpus, tmp_path)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("ranks", "mesh"), ALL_LAYOUTS)
def test_loads_under_any_mesh_bit_for_bit(ranks: int, mesh: dict[str, int], corpus: Path, tmp_path: Path) -> None:
    check_loading(ranks, mesh, ALL_LAYOUTS, corpus, tmp_path)


def pass_on_body(
    rank: int, corpus: Path, folder: Path, mesh: dict[str, int], first: dict[str, tuple[int, str]]
) -> tuple[list[str], list[str]]:
    """Load what another folding saved, and save it from this one: what of it differs from ``first``, and names."""
    engine = make_engine(with_heads(run_of(corpus, mesh)), dist.get_world_size())
    path = find_latest(folder, world_group())
    assert path is not None
    load_engine(engine, path, world_group())
    state = digests(everything(engine))
    engine.num_steps_done += 1  # so that it is a later checkpoint
    save_engine(engine, folder, world_group(), keep=1)
    return sorted(name for name in first if state.get(name) != first[name]), sorted(state)


def digests(state: State) -> dict[str, tuple[int, str]]:
    """Of a state, what two ranks can compare without sending it: size and hash by name."""
    return {
        name: (value.numel(), hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest())
        for name, value in state.items()
    }


def first_digests(rank: int, corpus: Path, folder: Path) -> dict[str, tuple[int, str]]:
    return digests(save_body(rank, corpus, folder, {})[0])


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_checkpoint_goes_through_every_folding(corpus: Path, tmp_path: Path) -> None:
    """Each folding of up to eight ranks loads what the one before it saved; nothing has changed at any of them."""
    (first,) = run_on_ranks(1, first_digests, corpus, tmp_path)
    # Pools of all numbers of ranks at once would be too many processes.
    order = sorted(foldings(), key=lambda folding: (folding[0] > 4, hashlib.sha256(repr(folding).encode()).digest()))
    assert len(order) == 236
    for ranks, dp, replicas, tp, edp, ep, etp in order:
        mesh = {"dp_shard": dp, "dp_replicate": replicas, "tp": tp, "edp": edp, "ep": ep, "etp": etp}
        for different, names in run_on_ranks(ranks, pass_on_body, corpus, tmp_path, mesh, first):
            assert (different, names) == ([], sorted(first)), mesh


def misplaced_body(rank: int, corpus: Path, folder: Path) -> bool:
    """Mutation: parts of experts change places as they are written. Whether what is read back differs."""
    engine = make_engine(run_of(corpus, {"etp": 2}), 2)
    before = engine.whole.parameters()["layers.1.moe.experts.w_in"]
    right = ExpertShape.boxes_of_shard
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExpertShape, "boxes_of_shard", lambda self, shard, *rest: right(self, 1 - shard, *rest))
        save_engine(engine, folder, world_group())
    path = find_latest(folder, world_group())
    assert path is not None
    load_engine(engine, path, world_group())
    return not torch.equal(engine.whole.parameters()["layers.1.moe.experts.w_in"], before)


@pytest.mark.dist
def test_misplaced_parts_would_show(corpus: Path, tmp_path: Path) -> None:
    assert all(run_on_ranks(2, misplaced_body, corpus, tmp_path))


@pytest.mark.dist
def test_each_expert_has_its_own_key(corpus: Path, tmp_path: Path) -> None:
    run_on_ranks(2, save_body, corpus, tmp_path)
    path = find_latest(tmp_path)
    assert path is not None
    tensors = Manifest.read(path).tensors
    for prefix in ("", "optim.exp_avg.", "optim.exp_avg_sq."):
        for expert in range(6):
            assert tensors[f"{prefix}layers.1.moe.experts.{expert}.w_in"].shape == (2, 24, 32)
            assert tensors[f"{prefix}layers.1.moe.experts.{expert}.w_out"].shape == (32, 24)
    assert tensors["balance.layers.1.bias_E"].shape == tensors["balance.layers.1.lagged_count_E"].shape == (6,)
    assert "optim.exp_avg.embed.weight" in tensors


def two_more(rank: int, corpus: Path, folder: Path, forget: str) -> tuple[list[float], list[float]]:
    """Two steps after three: straight on, and from the checkpoint with something of it forgotten."""
    engines = [make_engine(run_of(corpus, {"ep": 2}), 2) for _ in range(2)]
    for _ in range(3):
        do_step(engines[0])
    path = save_engine(engines[0], folder, world_group())
    load_engine(engines[1], path, world_group())
    if forget == "updates":
        set_num_updates(engines[1].optimizer, 0)
    elif forget == "balance":
        kept = engines[1].balance.state_dict()
        zeros = {layer: {n: torch.zeros_like(t) for n, t in kept[layer].items()} for layer in kept}
        engines[1].balance.load_state_dict(zeros)
    elif forget:
        for shard in engines[1].shards:
            if shard.value.numel():
                engines[1].optimizer.state[shard.value][forget].zero_()
    straight, resumed = ([do_step(engine).grad_norm for _ in range(2)] for engine in engines)
    return straight, resumed


@pytest.mark.dist
@pytest.mark.parametrize("forget", ["", "updates", "balance", "exp_avg", "exp_avg_sq"])
def test_going_on_is_bit_identical_and_needs_everything(forget: str, corpus: Path, tmp_path: Path) -> None:
    for straight, resumed in run_on_ranks(2, two_more, corpus, tmp_path, forget):
        assert (straight == resumed) is (forget == "")


def rounded_steps(rank: int, corpus: Path, folder: Path, rule: str) -> tuple[list[Any], list[Any]]:
    """Two steps after three, straight on and from the checkpoint, with rounded routing."""
    engines = [make_engine(run_of(corpus, {"ep": 2}, rounding=rule, tile=8), 2) for _ in range(2)]
    for _ in range(3):
        do_step(engines[0])
    load_engine(engines[1], save_engine(engines[0], folder, world_group()), world_group())
    reports = [[do_step(engine) for _ in range(2)] for engine in engines]
    straight, resumed = ([(r.grad_norm, r.rows_added, r.rows_dropped) for r in report] for report in reports)
    return straight, resumed


@pytest.mark.dist
@pytest.mark.parametrize("rule", ["stochastic", "balance"])
def test_rounding_goes_on_bit_identically(rule: str, corpus: Path, tmp_path: Path) -> None:
    for straight, resumed in run_on_ranks(2, rounded_steps, corpus, tmp_path, rule):
        assert straight == resumed
        assert straight[0] != straight[1]
        assert all(added + dropped > 0 for _, added, dropped in straight)


def other_model_body(rank: int, corpus: Path, folder: Path) -> None:
    run = make_run(corpus, corpus / "unused", layer=layer_config(num_experts=6, top_k=2, expert_width=16))
    path = find_latest(folder, world_group())
    assert path is not None
    with pytest.raises(ValueError, match=r"must be \[2, 16, 32\], the checkpoint has \[2, 24, 32\]"):
        load_engine(make_engine(with_heads(run), 1), path, world_group())


@pytest.mark.dist
def test_another_models_checkpoint_is_refused(corpus: Path, tmp_path: Path) -> None:
    run_on_ranks(2, save_body, corpus, tmp_path)
    run_on_ranks(1, other_model_body, corpus, tmp_path)
