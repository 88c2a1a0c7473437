"""The gradient norm without another rank: what it is, and how often the host waits for the device."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from known import grad_of
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.mesh.tensor_parallel import Cut
from moetrain.mesh.traffic import TrafficCounter
from moetrain.placement.chunks import ExpertShape
from moetrain.placement.current import CurrentPlacement
from moetrain.placement.placement import Placement
from moetrain.placement.sparse import SparseCollectives
from moetrain.placement.store import ExpertStore
from moetrain.train.grad_norm import Told, counts, sum_of_squares, total_over_ranks
from moetrain.train.shards import Shard


def shard_with(grad: Tensor | None, device: str = "cpu") -> Shard:
    value = nn.Parameter(torch.zeros(grad.shape if grad is not None else (3,), device=device))
    value.grad = None if grad is None else grad.to(value)
    return Shard("weight", tuple(value.shape), (0,) * value.dim(), value, value, decay=True)


def some_shards(count: int, device: str = "cpu") -> list[Shard]:
    generator = torch.Generator().manual_seed(count)
    grads = [torch.randn(index % 5, 7, generator=generator) * 10.0 ** (index % 3) for index in range(count)]
    return [shard_with(None, device), *(shard_with(grad, device) for grad in grads)]


@pytest.fixture
def alone() -> Iterator[MeshGroups]:
    """The groups of a world of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield MeshGroups.create(FoldedMesh())
    dist.destroy_process_group()


class Reads(TorchDispatchMode):
    """Counts values that the host takes out of tensors one at a time, each a wait for the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_sum_is_in_float64() -> None:
    shards = some_shards(40)
    exact = math.fsum(x * x for shard in shards[1:] for x in grad_of(shard.value).double().flatten().tolist())
    assert float(sum_of_squares(shards, "cpu")) == pytest.approx(exact, rel=1e-14)
    in_float32 = math.fsum(float(grad_of(shard.value).square().sum()) for shard in shards[1:])
    assert in_float32 != pytest.approx(exact, rel=1e-14)
    for nothing in ([], [shard_with(None)], [shard_with(torch.zeros(0, 4))]):
        total = sum_of_squares(nothing, "cpu")
        assert (total.dtype, total.shape, float(total)) == (torch.float64, (), 0.0)


def test_of_replicas_one_counts_and_of_parts_each() -> None:
    mesh = FoldedMesh(dp_replicate=2, dp_shard=2, tp=2, ep=4, edp=2)
    whole = shard_with(None)
    cut = replace(whole, cut=Cut(dim=0, start=0, size=3, total=6))
    expert = replace(whole, expert_layer=0)
    assert [rank for rank in range(8) if counts(whole, mesh, rank)] == [0, 2], "replicas over tp and dp_replicate"
    assert [rank for rank in range(8) if counts(cut, mesh, rank)] == [0, 1, 2, 3], "replicas over dp_replicate alone"
    assert [rank for rank in range(8) if counts(expert, mesh, rank)] == [*range(8)]


def test_no_gradient_is_read_by_the_host() -> None:
    """Tensors on ``meta`` have no values, so whoever reads one fails."""
    total = sum_of_squares(some_shards(5, "meta"), "meta")
    assert (total.device.type, total.dtype, total.shape) == ("meta", torch.float64, ())
    with pytest.raises(RuntimeError, match="item"):
        float(total)


def store_of(grad: Tensor | None) -> ExpertStore:
    """One layer of two experts, both owned here."""
    placed = {0: CurrentPlacement(Placement.of(1, [[0], [0]], [[0], [0]]))}
    collectives = SparseCollectives(None, 0, TrafficCounter())
    types = {"compute_dtype": torch.float32, "master_dtype": torch.float32}
    store = ExpertStore(ExpertShape(width=2, hidden=3, gated=True), placed, collectives, 0, **types, device="cpu")
    owned = store.owned_parameters()[0]
    owned.grad = None if grad is None else grad.expand_as(owned).clone()
    return store


@pytest.mark.parametrize("of_experts", [None, torch.tensor(0.5)], ids=["no experts' gradients", "experts' gradients"])
def test_the_host_waits_as_often_for_many_parameters_as_for_none(of_experts: Tensor | None, alone: MeshGroups) -> None:
    ce_sum, aux = torch.tensor(3.0, dtype=torch.float64), torch.tensor(0.25, dtype=torch.float64)
    told = Told(ce_sum, aux, num_loss_tokens=11, bytes_sent=2**50 + 7, bytes_between_nodes=5, digest=2**62 + 3)
    store = store_of(of_experts)
    experts = 0.0 if of_experts is None else 0.25 * store.owned_parameters()[0].numel()
    for shards in ([], some_shards(30)):
        squares = float(sum_of_squares(shards, "cpu")) + experts
        with Reads() as reads:
            totals = total_over_ranks(told, shards, store, alone)
        assert reads.count == 0, "everything comes over in one tensor"
        assert (totals.grad_norm, totals.ce_sum, totals.aux) == (squares**0.5, 3.0, 0.25)
        assert (totals.bytes_sent, totals.bytes_between_nodes, totals.digests) == (2**50 + 7, 5, (2**62 + 3,))
    with Reads() as reads:
        float(ce_sum)
    assert reads.count == 1


@pytest.mark.parametrize("digest", [0, 1, 2**32 - 1, 2**32, 2**53 + 1, 2**63 - 1])
def test_a_digest_comes_over_whole(digest: int, alone: MeshGroups) -> None:
    """In float64, which has 53 bits, as two halves."""
    zero = torch.zeros((), dtype=torch.float64)
    assert total_over_ranks(Told(zero, zero, 0, 0, 0, digest), [], store_of(None), alone).digests == (digest,)
