"""The norm of the whole gradient, each parameter counted once, and what else is summed over ranks per step."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.train.shards import Shard

EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class StepTotals:
    """Sums over all ranks, the same bits on every rank."""

    grad_norm: float
    ce_sum: float
    aux: float


def sum_of_squares(shards: Iterable[Shard], *, experts: bool) -> float:
    """Sum of squared gradient elements of the dense or of the expert shards, in float64 and in the shards' order."""
    total = 0.0
    for shard in shards:
        if (shard.expert_layer is not None) == experts and shard.value.grad is not None:
            total += float(torch.linalg.vector_norm(shard.value.grad, dtype=torch.float64)) ** 2
    return total


def counts_dense(mesh: FoldedMesh, rank: int) -> bool:
    """Whether this rank's dense shards count: replicas of the same shard must be counted once."""
    return all(mesh.coordinate(rank, axis) == 0 for axis in ("dp_replicate", "cp", "tp"))


def total_over_ranks(shards: Sequence[Shard], ce_sum: Tensor, aux: Tensor, groups: MeshGroups) -> StepTotals:
    """Gradient norm and loss sums over all ranks. Collective over the world.

    Every rank adds the same gathered numbers in ascending rank order, so all ranks get the same bits and take the
    same decisions (clipping, skipping) from them.
    """
    local = torch.tensor(
        [
            sum_of_squares(shards, experts=False) if counts_dense(groups.mesh, groups.rank) else 0.0,
            sum_of_squares(shards, experts=True),
            float(ce_sum),
            float(aux),
        ],
        dtype=torch.float64,
        device=ce_sum.device,
    )
    parts = [torch.empty_like(local) for _ in range(groups.size("world"))]
    dist.all_gather(parts, local, group=groups.group("world"))
    dense, expert, ce, aux_sum = (sum(column) for column in zip(*(part.tolist() for part in parts), strict=True))
    return StepTotals(grad_norm=(dense + expert) ** 0.5, ce_sum=ce, aux=aux_sum)


def clip_factor(grad_norm: float, clip_norm: float) -> float:
    """What gradients are multiplied with so that their norm is at most ``clip_norm``; 1 where clipping is off."""
    return 1.0 if clip_norm == 0 else min(1.0, clip_norm / (grad_norm + EPSILON))
