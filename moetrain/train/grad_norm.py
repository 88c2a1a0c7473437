"""The norm of the whole gradient, each parameter counted once, and what else is summed over ranks per step."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.placement.store import ExpertStore
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
    num_loss_tokens: int
    bytes_sent: int
    bytes_between_nodes: int
    digests: tuple[int, ...]  # of each rank's plan


@dataclass(frozen=True, slots=True, eq=False)
class Told:
    """What one rank tells all others at the end of a step.

    ``ce_sum`` and ``num_loss_tokens`` are the same on all ranks of a tp group, ``aux`` is not; bytes are this rank's;
    ``digest`` is a number below 2^63, of its plan.
    """

    ce_sum: Tensor
    aux: Tensor
    num_loss_tokens: int
    bytes_sent: int
    bytes_between_nodes: int
    digest: int


def sum_of_squares(shards: Iterable[Shard], device: torch.device | str) -> Tensor:
    """float64 [], on ``device``: the sum of squared gradient elements, which nobody has read yet.

    Reading it makes the host wait for the device; one number per parameter would be as many waits.
    """
    grads = [shard.value.grad for shard in shards if shard.value.grad is not None]
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float64) for grad in grads]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64, device=device)


def counts(shard: Shard, mesh: FoldedMesh, rank: int) -> bool:
    """Whether ``shard`` counts on this rank: of replicas of the same values, one does.

    Dense parameters are sharded over dp_shard and cp, and have replicas over dp_replicate and,
    unless cut, over tp.
    """
    if shard.expert_layer is not None:  # they have one owner
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


def expert_squares(store: ExpertStore, group: ProcessGroup) -> Tensor:
    """float64 []: the sum of squared gradients of all experts. Collective over the pool's ``group``.

    Each slice of an expert is summed alone, by whoever owns it, and the slices' sums always in the same order: who owns
    what changes no bit.
    """
    parts = []
    for layer, owned in store.owned_parameters().items():
        placement = store.placement(layer)
        sizes = (placement.num_experts, placement.num_slices, placement.num_shards)
        square_ESH = torch.zeros(sizes, dtype=torch.float64, device=owned.device)
        mine = placement.owned_by(store.pool_rank)
        if mine and owned.grad is not None:
            norms = torch._foreach_norm(list(owned.grad.unbind()), 2, dtype=torch.float64)
            expert_C, slice_C = torch.tensor(mine, device=owned.device).unbind(1)
            square_ESH[expert_C, slice_C, placement.shard_of(store.pool_rank)] = torch.stack(norms).square()
        parts.append(square_ESH.flatten())
    squares = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=store.device)
    dist.all_reduce(squares, group=group)  # of each one number and zeros: exact in any order
    return squares.sum()


def total_over_ranks(told: Told, dense: Sequence[Shard], store: ExpertStore, groups: MeshGroups) -> StepTotals:
    """Gradient norm, loss sums, traffic and plans over all ranks. Collective over the world.

    Every rank adds the same gathered numbers in ascending rank order, so all ranks get the same bits and take the
    same decisions (clipping, skipping) from them. What was gathered is read at once: this is where the host waits for
    the step's backward passes.
    """
    counted = [shard for shard in dense if counts(shard, groups.mesh, groups.rank)]
    squares = sum_of_squares(counted, told.ce_sum.device)
    of_experts = expert_squares(store, groups.group("pool"))
    if groups.group_rank("pool") == 0:
        squares = squares + of_experts
    speaks = groups.group_rank("tp") == 0  # for its tp group
    mine = told.ce_sum if speaks else torch.zeros_like(told.ce_sum)
    halves = (told.digest >> 32, told.digest & 0xFFFFFFFF)  # whole numbers that float64 keeps
    loss_tokens = told.num_loss_tokens if speaks else 0
    host_5 = torch.tensor((loss_tokens, told.bytes_sent, told.bytes_between_nodes, *halves), dtype=torch.float64)
    losses_3 = torch.stack([squares, mine.double(), told.aux.double()])
    local_8 = torch.cat((losses_3, host_5.to(told.ce_sum.device, non_blocking=True)))
    gathered_W8 = local_8.new_zeros(groups.size("world"), 8)
    dist.all_gather(list(gathered_W8.unbind()), local_8, group=groups.group("world"))
    rows = gathered_W8.tolist()
    squared, ce, aux, *whole = (sum(column) for column in list(zip(*rows, strict=True))[:6])
    num_loss_tokens, num_bytes, between_nodes = map(int, whole)
    return StepTotals(
        grad_norm=squared**0.5,
        ce_sum=ce,
        aux=aux,
        num_loss_tokens=num_loss_tokens,
        bytes_sent=num_bytes,
        bytes_between_nodes=between_nodes,
        digests=tuple((int(row[6]) << 32) + int(row[7]) for row in rows),
    )


def clip_factor(grad_norm: float, clip_norm: float) -> float:
    """What gradients are multiplied with so that their norm is at most ``clip_norm``; 1 where clipping is off."""
    return 1.0 if clip_norm == 0 else min(1.0, clip_norm / (grad_norm + EPSILON))
