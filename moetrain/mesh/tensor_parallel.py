"""Tensor parallelism with sequence parallelism: what the ranks of a tp group hold of layers and of tokens.

A tp group computes the same packed rows. Between layers each of its ranks has every t-th of their T tokens only
(Korthikanti et al., 2205.05198); around attention and dense MLPs, whose matrices are cut over the group, tokens are
gathered and partial results are summed and scattered. Shapes: T tokens of a micro-batch, W ranks of the group,
t = ceil(T / W) tokens of a rank, D width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from moetrain.config.errors import require
from moetrain.mesh.traffic import Tally, TrafficCounter


@dataclass(frozen=True, slots=True)
class Cut:
    """The part [start, start + size) along dimension ``dim`` of a parameter of which ``total`` elements lie there."""

    dim: int
    start: int
    size: int
    total: int


def uncut(shape: Sequence[int], offset: Sequence[int], cut: Cut | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where a box of a cut parameter lies in the whole one: the whole's shape, and the box's offset in it.

    >>> uncut((4, 6), (2, 0), Cut(dim=0, start=4, size=4, total=8))
    ((8, 6), (6, 0))
    """
    whole, place = list(shape), list(offset)
    if cut is not None:
        whole[cut.dim] = cut.total
        place[cut.dim] += cut.start
    return tuple(whole), tuple(place)


@dataclass(frozen=True, slots=True, eq=False)
class TensorParallel:
    """One rank's place in its tp group. Without a group there is one rank, and nothing moves.

    Args:
        group: the process group.
        rank: this rank's index in it.
        counter: where rows and bytes that leave this rank are counted, as "tp_gather" and "tp_scatter"; gradients
            travel by the other of the two, and count as "tp_gather_grad" and "tp_scatter_grad".
    """

    group: ProcessGroup | None = None
    rank: int = 0
    counter: TrafficCounter | None = None

    @property
    def size(self) -> int:
        """W."""
        return 1 if self.group is None else self.group.size()

    def cut(self, dim: int, total: int) -> Cut:
        """This rank's part of ``total`` columns, rows or heads: parts differ by one at most.

        >>> [(cut.start, cut.size) for cut in (TensorParallel().cut(0, 7),)]
        [(0, 7)]
        """
        start, stop = self.rank * total // self.size, (self.rank + 1) * total // self.size
        return Cut(dim, start, stop - start, total)

    def num_local(self, num_tokens: int) -> int:
        """t: the last rank's may be padding in part, or all of it."""
        return -(-num_tokens // self.size)

    def local(self, x_T: Tensor, padding: int | bool) -> Tensor:
        """[T, ...] -> this rank's [t, ...]; what lies beyond T is ``padding``. No communication, no gradient."""
        if self.size == 1:
            return x_T
        count = self.num_local(x_T.shape[0])
        mine = x_T[self.rank * count : (self.rank + 1) * count]
        if mine.shape[0] == count:
            return mine
        return torch.cat((mine, mine.new_full((count - mine.shape[0], *x_T.shape[1:]), padding)))

    def gather(self, x_tD: Tensor, num_tokens: int) -> Tensor:
        """[t, D] of each rank -> [T, D] on all; the gradient is summed over ranks and scattered. Collective.

        Raises:
            ValueError: there are not ``num_local(num_tokens)`` tokens.
        """
        if self.group is None:
            return x_tD
        require(
            x_tD.shape[0] == self.num_local(num_tokens),
            f"TensorParallel.gather: {num_tokens} tokens over {self.size} ranks are {self.num_local(num_tokens)} on "
            f"each, got {x_tD.shape[0]}; pad with TensorParallel.local",
        )
        gathered_TD: Tensor = _Gather.apply(x_tD, num_tokens, self.group, self.counter)
        return gathered_TD

    def scatter_sum(self, x_TD: Tensor) -> Tensor:
        """Partial [T, D] of each rank -> this rank's [t, D] of their sum; the gradient is gathered. Collective."""
        if self.group is None:
            return x_TD
        scattered_tD: Tensor = _ScatterSum.apply(x_TD, self.group, self.counter)
        return scattered_tD

    def all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """``x`` reduced over the group in place, and returned. No gradient."""
        if self.group is not None:
            dist.all_reduce(x, op=op, group=self.group)
        return x

    def whole(self, part: Tensor, cut: Cut) -> Tensor:
        """The whole of a tensor of which this rank has ``part``, on every rank. Collective, no gradient."""
        if self.group is None:
            return part
        shape = list(part.shape)
        shape[cut.dim] = cut.total
        full = part.new_zeros(shape)
        full.narrow(cut.dim, cut.start, cut.size).copy_(part.detach())
        return self.all_reduce(full)


def _gather(x_tD: Tensor, num_tokens: int, group: ProcessGroup) -> Tensor:
    out = x_tD.new_empty(x_tD.shape[0] * group.size(), *x_tD.shape[1:])
    if out.numel():
        _all_gather(out, x_tD.contiguous(), group)
    return out[:num_tokens]


def _scatter_sum(x_TD: Tensor, group: ProcessGroup) -> Tensor:
    count = -(-x_TD.shape[0] // group.size())
    missing = count * group.size() - x_TD.shape[0]
    if missing:
        x_TD = torch.cat((x_TD, x_TD.new_zeros(missing, *x_TD.shape[1:])))
    out = x_TD.new_empty(count, *x_TD.shape[1:])
    if out.numel():
        _reduce_scatter(out, x_TD.contiguous(), group)
    return out


def _all_gather(out: Tensor, x: Tensor, group: ProcessGroup) -> None:
    # Torch 2.13 renames the function and warns of the old name.
    function = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    function(out, x, group=group)


def _reduce_scatter(out: Tensor, x: Tensor, group: ProcessGroup) -> None:
    function = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    function(out, x, group=group)


def _count(counter: TrafficCounter | None, purpose: str, x_tD: Tensor, group: ProcessGroup) -> None:
    """Each rank's t rows go to every other rank; summing on the way needs no fewer bytes to leave a rank."""
    Tally(counter, purpose, group).add(x_tD, [x_tD.shape[0]] * group.size())


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_tD: Tensor, num_tokens: int, group: ProcessGroup, counter: TrafficCounter | None) -> Tensor:
        ctx.group, ctx.counter = group, counter
        _count(counter, "tp_gather", x_tD, group)
        return _gather(x_tD, num_tokens, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None, None, None]:
        grad_tD = _scatter_sum(grad_TD, ctx.group)
        _count(ctx.counter, "tp_gather_grad", grad_tD, ctx.group)
        return grad_tD, None, None, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, group: ProcessGroup, counter: TrafficCounter | None) -> Tensor:
        ctx.group, ctx.counter, ctx.num_tokens = group, counter, x_TD.shape[0]
        out_tD = _scatter_sum(x_TD, group)
        _count(counter, "tp_scatter", out_tD, group)
        return out_tD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_tD: Tensor) -> tuple[Tensor, None, None]:
        _count(ctx.counter, "tp_scatter_grad", grad_tD, ctx.group)
        return _gather(grad_tD, ctx.num_tokens, ctx.group), None, None
