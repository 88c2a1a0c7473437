"""Sharded models on local ranks: the same initial values on any number of them, and summed gradients."""

from typing import Any

import pytest
import torch
from models.whole import MODEL, MOE, largest_error, make_batch, one_process_model, whole_values
from ranks import run_on_ranks
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from moetrain.config import MeshConfig, RunConfig, TrainConfig
from moetrain.mesh.collectives import all_reduce_sum
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.models import build
from moetrain.models.build import BuiltModel, build_model
from moetrain.models.fsdp import set_gradient_sync
from moetrain.models.init import expert_values, fill_parameters
from moetrain.moe.routers.contract import Router
from moetrain.sequence.batch import PackedBatch

ROUNDS = [[[9, 3], [12], [4, 4, 2]], [[12], [6]]]  # documents of the global batch's rows, round by round
LAYOUTS = [
    (1, {}),
    (2, {}),
    (2, {"ep": 2}),
    (2, {"dp_replicate": 2}),
    (3, {"ep": 3}),
    (4, {"dp_replicate": 2, "ep": 4}),
    (4, {"ep": 2}),
]

pytestmark = pytest.mark.dist


def _run(mesh: dict[str, Any], **train: Any) -> RunConfig:
    return RunConfig(
        model=MODEL, moe=MOE.moe, mesh=MeshConfig(**mesh), train=TrainConfig(**({"dtype": "float64"} | train))
    )


def _build(run: RunConfig) -> tuple[BuiltModel, MeshGroups]:
    mesh = FoldedMesh.from_config(run.mesh, torch.distributed.get_world_size())
    groups = MeshGroups.create(mesh)
    return build_model(run, groups, "cpu"), groups


def _rows(round_idx: int, rank: int, world_size: int) -> PackedBatch:
    """This rank's rows of a round: every world_size-th one; ranks beyond the rows get none."""
    whole = make_batch(ROUNDS[round_idx], seed=round_idx)
    mine = range(100 + rank, 100 + len(ROUNDS[round_idx]), world_size)
    kept_P = [piece.sequence in mine for piece in whole.pieces]
    kept_T = torch.repeat_interleave(torch.tensor(kept_P, dtype=torch.bool), whole.offsets().diff())
    pieces = tuple(piece for piece, kept in zip(whole.pieces, kept_P, strict=True) if kept)
    return PackedBatch(whole.token_id_T[kept_T], whole.target_T[kept_T], pieces)


def initial_body(rank: int, mesh: dict[str, int]) -> dict[str, Tensor]:
    built, _ = _build(_run(mesh))
    return whole_values(built.model, built.store)


def step_body(
    rank: int, mesh: dict[str, int], train: dict[str, Any], average: bool
) -> tuple[float, float, dict[str, Tensor]]:
    built, groups = _build(_run(mesh, **train))
    if average:
        for module in built.model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(float(groups.size("data")))
    sums = torch.zeros(2, dtype=torch.float64)
    for round_idx in range(len(ROUNDS)):
        set_gradient_sync(built.model, round_idx == len(ROUNDS) - 1)
        batch = _rows(round_idx, groups.group_rank("data"), groups.size("data"))
        output = built.model(batch, num_step_tokens=50)
        (output.ce_sum / 40 + output.aux).backward()
        sums += torch.stack((output.ce_sum.detach(), output.aux.detach())).double()
    built.store.reduce_gradients()
    ce_sum, aux = all_reduce_sum(sums, groups.group("data")).tolist()
    return ce_sum, aux, whole_values(built.model, built.store, gradients=True)


def _one_process(dtype: torch.dtype = torch.float64) -> tuple[float, float, dict[str, Tensor]]:
    network, store, _ = one_process_model(MODEL, MOE, dtype)
    run = _run({})
    fill_parameters(network, MODEL, run.seed, {})
    store.initialise(expert_values(MODEL, store.shape, run.seed))
    ce_sum = aux = 0.0
    for round_idx in range(len(ROUNDS)):
        output = network(_rows(round_idx, 0, 1), num_step_tokens=50)
        (output.ce_sum / 40 + output.aux).backward()
        ce_sum += float(output.ce_sum.detach())
        aux += float(output.aux.detach())
    store.reduce_gradients()
    return ce_sum, aux, whole_values(network, store, gradients=True)


@pytest.mark.parametrize(("world_size", "mesh"), LAYOUTS)
def test_initial_values_do_not_depend_on_ranks(world_size: int, mesh: dict[str, int]) -> None:
    network, store, _ = one_process_model(MODEL, MOE, torch.float64)
    seed = _run({}).seed
    fill_parameters(network, MODEL, seed, {})
    store.initialise(expert_values(MODEL, store.shape, seed))
    want = whole_values(network, store)
    for found in run_on_ranks(world_size, initial_body, mesh):
        assert found.keys() == want.keys()
        assert all(torch.equal(found[name], value) for name, value in want.items())
    fill_parameters(network, MODEL, seed + 1, {})
    assert not torch.equal(network.embed.weight, want["embed.weight"])


@pytest.mark.parametrize(("world_size", "mesh"), LAYOUTS)
def test_gradients_are_sums_over_ranks_and_rounds(world_size: int, mesh: dict[str, int]) -> None:
    want_ce, want_aux, want = _one_process()
    for ce_sum, aux, grads in run_on_ranks(world_size, step_body, mesh, {}, False):
        assert ce_sum == pytest.approx(want_ce, rel=1e-12)
        assert aux == pytest.approx(want_aux, rel=1e-12)
        assert largest_error(grads, want) < 1e-11


def test_averaged_gradients_are_told_apart() -> None:
    _, _, want = _one_process()
    for _, _, grads in run_on_ranks(2, step_body, {"ep": 2}, {}, True):
        assert largest_error(grads, want) > 0.1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recomputation_changes_no_bit_under_sharding(dtype: str) -> None:
    kept = run_on_ranks(2, step_body, {"ep": 2}, {"dtype": dtype}, False)
    recomputed = run_on_ranks(2, step_body, {"ep": 2}, {"dtype": dtype, "activation_checkpoint": True}, False)
    for one, other in zip(kept, recomputed, strict=True):
        assert one[:2] == other[:2]
        assert all(torch.equal(grad, other[2][name]) for name, grad in one[2].items())


def test_bfloat16_computes_near_float32_with_float32_gradients() -> None:
    want_ce, _, want = _one_process()
    for ce_sum, _, grads in run_on_ranks(2, step_body, {}, {"dtype": "bfloat16"}, False):
        assert ce_sum == pytest.approx(want_ce, rel=1e-3)
        assert all(grad.dtype == torch.float32 for grad in grads.values())
        error = largest_error({"embed.weight": grads["embed.weight"].double()}, {"embed.weight": want["embed.weight"]})
        assert 1e-6 < error < 0.1


def types_body(rank: int) -> tuple[set[torch.dtype], set[torch.dtype], set[torch.dtype]]:
    built, _ = _build(_run({}, dtype="bfloat16"))
    masters = {parameter.dtype for parameter in built.model.parameters()}
    assert all(isinstance(parameter, DTensor) for parameter in built.model.parameters())
    seen: dict[bool, set[torch.dtype]] = {True: set(), False: set()}

    def look(module: torch.nn.Module, args: Any, output: Any) -> None:
        for parameter in module.parameters(recurse=False):
            seen[isinstance(module, Router)].add(parameter.dtype)

    handles = [module.register_forward_hook(look) for module in built.model.modules() if not list(module.children())]
    assert handles
    built.model(_rows(0, 0, 1), num_step_tokens=50)
    return seen[True], seen[False], masters


def test_narrow_compute_keeps_masters_and_routers_wide() -> None:
    for routers, others, masters in run_on_ranks(1, types_body):
        assert routers == {torch.float32}
        assert others == {torch.bfloat16}
        assert masters == {torch.float32}


def _shards(model: nn.Module) -> list[Tensor]:
    return [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]


def stale_body(rank: int, use_logits: bool) -> tuple[float, float]:
    """Change the masters after an evaluation, as loading does; the largest change of logits, and what is amiss."""
    changed, fresh = (_build(_run({}))[0].model for _ in range(2))
    changed_shards, fresh_shards = (_shards(model) for model in (changed, fresh))
    batch = _rows(0, 0, 1)
    with torch.no_grad():
        if not use_logits:
            changed(batch, num_step_tokens=50)
        before_TV = changed.logits(batch)
        for shard in (*changed_shards, *fresh_shards):
            shard.mul_(1.5)
        after_TV = changed.logits(batch)
        return float((before_TV - after_TV).abs().max()), float((after_TV - fresh.logits(batch)).abs().max())


@pytest.mark.parametrize("use_logits", [False, True])
def test_evaluation_leaves_no_stale_parameters(use_logits: bool) -> None:
    for change, amiss in run_on_ranks(2, stale_body, use_logits):
        assert change > 1e-3
        assert amiss == 0.0


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_takes_bf16_where_the_device_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, native: bool, expected: torch.dtype
) -> None:
    asked: list[object] = []

    def answer(device: object) -> bool:
        asked.append(device)
        return native

    monkeypatch.setattr(build, "multiplies_bf16", answer)
    assert build.compute_dtype(RunConfig(train=TrainConfig(dtype="auto")), "cpu") == expected
    assert asked == ["cpu"]
    assert build.compute_dtype(RunConfig(train=TrainConfig(dtype="float64")), "cpu") == torch.float64
