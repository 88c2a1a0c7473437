"""Engines of up to 4,096 ranks under HSDP, tp, edp and ep, a rank at a time, on collectives that move nothing.

What is computed means nothing here; who holds what, and how often ranks talk, must be right.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layer_configs import layer_config
from torch import Tensor
from torch.distributed.tensor import debug
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from train.tiny_run import do_step, make_engine, make_run

from moetrain.config import MeshConfig
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.train.engine import Engine

EXPERTS, WIDTH, HIDDEN = 64, 32, 24
ELEMENTS = EXPERTS * 3 * HIDDEN * WIDTH  # of all experts of the one layer that has some
WORLDS: dict[int, dict[str, Any]] = {
    8: {"dp_replicate": 2, "tp": 2, "ep": 4},
    64: {"dp_replicate": 2, "tp": 2, "ep": 16},
    512: {"dp_replicate": 4, "tp": 2, "ep": 64},
    4096: {"dp_replicate": 8, "tp": 2, "ep": 64},
}


@contextmanager
def engine_of(rank: int, world: int, axes: dict[str, Any], corpus: Path) -> Iterator[Engine]:
    """The engine of one rank among ``world``."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    layer = layer_config(num_experts=EXPERTS, top_k=2, expert_width=HIDDEN)
    try:
        yield make_engine(make_run(corpus, corpus / "unused", mesh=MeshConfig(**axes), layer=layer), world)
    finally:
        dist.destroy_process_group()
        debug._clear_sharding_prop_cache()  # what it holds of an equal mesh is another rank's


@pytest.mark.parametrize(
    ("world", "axes"),
    [
        (8, WORLDS[8]),
        (8, {"dp_replicate": 2, "ep": 2, "etp": 2}),
        (12, {"dp_replicate": 3, "tp": 2, "ep": 3, "etp": 2}),
        (64, WORLDS[64]),
    ],
)
def test_ranks_hold_every_element_as_often_as_it_is_replicated(world: int, axes: dict[str, Any], corpus: Path) -> None:
    """Dense ones once per replica, whole ones once more per tp coordinate; those of experts have one owner."""
    dense: dict[str, Tensor] = {}
    copies: dict[str, int] = {}
    tp, etp = axes.get("tp", 1), axes.get("etp", 1)
    owned = torch.zeros(EXPERTS, etp, ELEMENTS // EXPERTS // etp, dtype=torch.int32)
    for rank in range(world):
        with engine_of(rank, world, axes, corpus) as engine:
            for shard in engine.dense:
                held = dense.setdefault(shard.name, torch.zeros(shard.shape, dtype=torch.int32))
                held[shard.region(shard.local())] += 1
                copies[shard.name] = axes["dp_replicate"] * (1 if shard.cut is not None else tp)
            for chunk in engine.store.owned_chunks(1):
                owned[chunk.expert, chunk.shard, chunk.start : chunk.stop] += 1
    assert {name for name, held in dense.items() if not bool((held == copies[name]).all())} == set()
    assert bool((owned == 1).all())
    assert len(set(copies.values())) == (2 if tp > 1 else 1)


REDUCE_SCATTER = dist.reduce_scatter_tensor


class Done:
    """The handle of a collective that is over."""

    def wait(self) -> bool:
        return True


def exchange(out: Tensor, x: Tensor, *splits: Any, **options: Any) -> Done | None:
    """Every other rank sends what it is sent."""
    out.copy_(x) if out.shape == x.shape else out.zero_()
    return Done() if options.get("async_op") else None


def reduce_scatter(output: Tensor, input: Tensor, *args: Any, **options: Any) -> Any:
    """Every other rank adds zeros: torch 2.11's fake backend, unlike later ones, leaves what the memory held."""
    output.copy_(input.flatten()[: output.numel()].view_as(output))
    return REDUCE_SCATTER(output, input, *args, **options)


def talk_of_a_step(rank: int, world: int, corpus: Path) -> Counter[str]:
    """How often one rank calls which collective in an optimizer step; its share of the experts is checked besides."""
    mesh = FoldedMesh.from_config(MeshConfig(**WORLDS[world]), world)
    with engine_of(rank, world, WORLDS[world], corpus) as engine:
        (owned,) = (shard.value for shard in engine.experts)
        alignment = 128  # elements, which slices are rounded up to
        assert owned.numel() <= ELEMENTS / world + alignment * owned.shape[0]
        assert engine.groups.dense_mesh().shape == (mesh.dp_replicate, mesh.dp_shard)
        before = sum(shard.value.numel() for shard in engine.dense)
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as trace:  # else torch 2.11 warns
            report = do_step(engine)
        assert report.num_loss_tokens > 0
        assert sum(shard.value.numel() for shard in engine.dense) == before
        largest = sum(-(-shard.shape[0] // mesh.dp_shard) * math.prod(shard.shape[1:]) for shard in engine.dense)
        assert before <= largest
    return Counter(event.name.removeprefix("c10d::") for event in trace.events() if event.name.startswith("c10d::"))


def test_a_step_takes_as_many_collectives_at_4096_ranks_as_at_8(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only messages between the holders of an expert grow in number, with edp."""
    monkeypatch.setattr(dist, "all_to_all_single", exchange)
    monkeypatch.setattr(Engine, "_check_seen", lambda *_: None)  # nobody else saw a token
    monkeypatch.setattr(dist, "reduce_scatter_tensor", reduce_scatter)
    seen = {world: talk_of_a_step(0, world, corpus) for world in WORLDS}
    for world, axes in WORLDS.items():
        holders = world // axes["ep"]
        sent, received = seen[world].pop("send"), seen[world].pop("recv_")
        assert sent == received == 2 * (holders - 1), "weights to each other holder, gradients from it"
    for small, large in itertools.pairwise(WORLDS):
        assert seen[small] == seen[large]
    assert seen[8]["_reduce_scatter_base_"] > 4
    idle = talk_of_a_step(4095, 4096, corpus)  # has no rows in this step, nor a share of most dense parameters
    dense_units = 4  # two blocks, one router, and the rest
    assert idle["_reduce_scatter_base_"] == dense_units
    assert idle["_allgather_base_"] >= dense_units
