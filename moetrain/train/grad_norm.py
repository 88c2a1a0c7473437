"""The norm of the whole gradient, each parameter counted once, and what else is summed over ranks per step."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.mesh.traffic import TrafficCounter
from moetrain.train.shards import Shard, zeros_if_none

# Beside the norm in the clip factor, as in torch's clip_grad_norm_: clipped gradients equal torch's, and a norm of 1
# comes out a millionth short of the limit. Nothing that vanishes is divided by it.
EPSILON = 1e-6


@dataclass(frozen=True, slots=True)
class StepTotals:
    """Sums over all ranks, the same bits on every rank."""

    grad_norm: float
    ce_sum: float
    aux: float
    bytes_sent: int
    bytes_between_nodes: int


def sum_of_squares(shards: Iterable[Shard], device: torch.device | str) -> Tensor:
    """float64 [], on ``device``: the sum of squared gradient elements, which nobody has read yet.

    Reading it makes the host wait for the device; one number per parameter would be as many waits.
    """
    grads = [shard.value.grad for shard in shards if shard.value.grad is not None]
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64, device=device)


def counts(shard: Shard, mesh: FoldedMesh, rank: int) -> bool:
    """Whether ``shard`` counts on this rank: of replicas of the same values, one does.

    Experts have one owner. Dense parameters are sharded over dp_shard and cp, and have replicas over dp_replicate and,
    unless cut, over tp.
    """
    if shard.expert_layer is not None:
        return True
    replicas = ("dp_replicate",) if shard.cut is not None else ("dp_replicate", "tp")
    return all(mesh.coordinate(rank, axis) == 0 for axis in replicas)


def sum_over_tp(shards: Iterable[Shard], groups: MeshGroups) -> None:
    """Add up the gradients of what every rank of a tp group has: each saw its own tokens, or heads, alone.

    One all-reduce for all of them, whose result has the same bits on every rank. Collective over tp.
    """
    if groups.size("tp") == 1:
        return
    shared = [shard for shard in shards if shard.expert_layer is None and shard.cut is None]
    grads = [zeros_if_none(shard.value.grad, shard.value.detach()) for shard in shared]
    for dtype in sorted({grad.dtype for grad in grads}, key=str):
        alike = [index for index, grad in enumerate(grads) if grad.dtype == dtype]
        flat = torch.cat([grads[index].flatten() for index in alike])
        dist.all_reduce(flat, group=groups.group("tp"))
        parts = flat.split([grads[index].numel() for index in alike])
        for index, part in zip(alike, parts, strict=True):
            shared[index].value.grad = part.view_as(grads[index])


def total_over_ranks(
    shards: Sequence[Shard], ce_sum: Tensor, aux: Tensor, traffic: TrafficCounter, groups: MeshGroups
) -> StepTotals:
    """Gradient norm, loss sums and traffic over all ranks. Collective over the world.

    Every rank adds the same gathered numbers in ascending rank order, so all ranks get the same bits and take the
    same decisions (clipping, skipping) from them. ``ce_sum`` is the same on all ranks of a tp group, ``aux`` is not.
    What was gathered is read at once: this is where the host waits for the step's backward passes.
    """
    counted = [shard for shard in shards if counts(shard, groups.mesh, groups.rank)]
    mine = ce_sum if groups.group_rank("tp") == 0 else torch.zeros_like(ce_sum)
    sent = (traffic.bytes, traffic.between_nodes)
    sent_2 = torch.tensor([sum(counts.values()) for counts in sent], dtype=torch.float64)
    losses_3 = torch.stack([sum_of_squares(counted, ce_sum.device), mine.double(), aux.double()])
    local_5 = torch.cat((losses_3, sent_2.to(ce_sum.device, non_blocking=True)))
    gathered_W5 = local_5.new_zeros(groups.size("world"), 5)
    dist.all_gather(list(gathered_W5.unbind()), local_5, group=groups.group("world"))
    squares, ce, aux_sum, num_bytes, between_nodes = (sum(column) for column in zip(*gathered_W5.tolist(), strict=True))
    return StepTotals(
        grad_norm=squares**0.5,
        ce_sum=ce,
        aux=aux_sum,
        bytes_sent=int(num_bytes),
        bytes_between_nodes=int(between_nodes),
    )


def clip_factor(grad_norm: float, clip_norm: float) -> float:
    """What gradients are multiplied with so that their norm is at most ``clip_norm``; 1 where clipping is off."""
    return 1.0 if clip_norm == 0 else min(1.0, clip_norm / (grad_norm + EPSILON))
