"""Collectives over one process group. Shapes: R rows, D width, W ranks in the group, C counters per rank."""

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


def all_to_all_rows(
    x_RD: Tensor,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    group: ProcessGroup,
    *,
    counter: TrafficCounter | None = None,
    purpose: str = "dispatch",
) -> Tensor:
    """Send rows to every rank of ``group`` and wait for what comes; see ``start_all_to_all_rows``.

    Returns:
        Received rows ``[sum(recv_counts), D]`` in order of source rank.
    """
    return start_all_to_all_rows(x_RD, send_counts, recv_counts, group, counter=counter, purpose=purpose).wait()


def start_all_to_all_rows(
    x_RD: Tensor,
    send_counts: Sequence[int],
    recv_counts: Sequence[int],
    group: ProcessGroup,
    *,
    counter: TrafficCounter | None = None,
    purpose: str = "dispatch",
) -> "PendingRows":
    """Begin to send rows to every rank of ``group``; the gradient goes back the same way.

    Every rank of the group must call this, and take part in backward, even with zero rows. In a group of one nothing
    moves.

    Args:
        x_RD: rows in order of destination; further dimensions are allowed. Unchanged until the rows have been received.
        send_counts: rows for each rank of the group; they sum to R.
        recv_counts: rows from each rank of the group.
        group: the process group.
        counter: where rows and bytes that leave this rank are counted.
        purpose: what they are counted as; backward counts as ``purpose + "_grad"``.

    Raises:
        ValueError: the counts do not fit the group or the rows.
    """
    _check_counts(x_RD, send_counts, recv_counts, group.size())
    if group.size() == 1:
        return PendingRows(x_RD, None)
    exchange = _Exchange(list(send_counts), list(recv_counts), group, Tally(counter, purpose, group))
    return PendingRows(_StartExchange.apply(x_RD, exchange), exchange)


def _check_counts(x_RD: Tensor, send_counts: Sequence[int], recv_counts: Sequence[int], size: int) -> None:
    require(
        len(send_counts) == size and len(recv_counts) == size,
        f"all_to_all_rows: send_counts ({len(send_counts)}) and recv_counts ({len(recv_counts)}) must have one entry "
        f"per rank of the group ({size}); pass a count, 0 if need be, for each",
    )
    require(
        min(*send_counts, *recv_counts) >= 0,
        f"all_to_all_rows: counts must be at least 0, got {list(send_counts)} and {list(recv_counts)}",
    )
    require(
        sum(send_counts) == x_RD.shape[0],
        f"all_to_all_rows: send_counts sum to {sum(send_counts)} but there are {x_RD.shape[0]} rows; "
        "count every row once",
    )
    require(
        size > 1 or send_counts[0] == recv_counts[0],
        f"all_to_all_rows: a group of one sends {send_counts[0]} rows to itself but expects {recv_counts[0]}; "
        "pass equal counts",
    )


class PendingRows:
    """Rows of an all-to-all that is pending: ``wait`` gives them, once; nobody may write into them.

    Between start and ``wait`` this rank may compute, or start more; all ranks start and wait in the same order. In the
    backward pass the gradient is sent where ``wait`` stood and waited for where the start stood, so that what was
    computed in between has its backward pass in between as well.
    """

    def __init__(self, rows_RD: Tensor, exchange: "_Exchange | None") -> None:
        self._rows_RD = rows_RD
        self._exchange = exchange
        self._has_waited = False

    def wait(self) -> Tensor:
        """The received rows.

        Raises:
            RuntimeError: they were asked for before: their gradient can be sent back only once.
        """
        if self._has_waited:
            raise RuntimeError("PendingRows.wait: these rows have been handed out; keep what the first call returned")
        self._has_waited = True
        if self._exchange is None:
            return self._rows_RD
        received_RD: Tensor = _FinishExchange.apply(self._rows_RD, self._exchange)
        return received_RD


@dataclass(slots=True, eq=False)
class _Exchange:
    send_counts: list[int]
    recv_counts: list[int]
    group: ProcessGroup
    tally: Tally
    work: dist.Work | None = None
    grad: tuple[Tensor, dist.Work | None] | None = None  # pending, in the other direction


class _StartExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.tally.add(x_RD, exchange.send_counts)
        out_RD, exchange.work = _start_exchange(x_RD, exchange.send_counts, exchange.recv_counts, exchange.group)
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        # The gradient that comes by way of autograd is the one that _FinishExchange sent: it has another shape.
        assert ctx.exchange.grad is not None
        recv_RD, work = ctx.exchange.grad
        ctx.exchange.grad = None
        if work is not None:
            work.wait()
        return recv_RD, None


class _FinishExchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        if exchange.work is not None:
            exchange.work.wait()
            exchange.work = None
        return rows_RD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        exchange = ctx.exchange
        exchange.tally.add(grad_RD, exchange.recv_counts, "_grad")
        exchange.grad = _start_exchange(grad_RD, exchange.recv_counts, exchange.send_counts, exchange.group)
        return grad_RD, None


def _start_exchange(
    x_RD: Tensor, send_counts: list[int], recv_counts: list[int], group: ProcessGroup
) -> tuple[Tensor, dist.Work | None]:
    out_RD = x_RD.new_empty(sum(recv_counts), *x_RD.shape[1:])
    work = dist.all_to_all_single(out_RD, x_RD.contiguous(), recv_counts, send_counts, group=group, async_op=True)
    return out_RD, work


def gather_rows_of_all(
    x_RD: Tensor,
    counts: Sequence[int],
    group: ProcessGroup,
    *,
    counter: TrafficCounter | None = None,
    purpose: str = "etp_gather",
) -> Tensor:
    """The rows of every rank of ``group``, in its order, on every rank; backward sums their gradients.

    Sums run in at least float32, in ascending rank order. Collective; ranks may have no rows.

    Args:
        x_RD: this rank's rows; further dimensions are allowed.
        counts: rows of each rank.
        group: the process group.
        counter: where rows and bytes that leave this rank are counted, once for each rank they go to.
        purpose: what they are counted as; backward counts as ``purpose + "_grad"``.

    Raises:
        ValueError: the counts do not fit the group or the rows.
    """
    _check_share("gather_rows_of_all", counts, x_RD.shape[0], group, own=True)
    if group.size() == 1:
        return x_RD
    gathered: Tensor = _GatherRows.apply(x_RD, list(counts), group, Tally(counter, purpose, group))
    return gathered


def sum_rows_of_all(
    x_RD: Tensor,
    counts: Sequence[int],
    group: ProcessGroup,
    *,
    counter: TrafficCounter | None = None,
    purpose: str = "etp_sum",
) -> Tensor:
    """This rank's ``counts[rank]`` rows of the sum of all ranks' ``x_RD``: the reverse of ``gather_rows_of_all``.

    Every rank gives ``sum(counts)`` rows in the order of ranks. Sums run in at least float32, in ascending rank order.

    Raises:
        ValueError: the counts do not fit the group or the rows.
    """
    _check_share("sum_rows_of_all", counts, x_RD.shape[0], group, own=False)
    if group.size() == 1:
        return x_RD
    summed: Tensor = _SumRows.apply(x_RD, list(counts), group, Tally(counter, purpose, group))
    return summed


def _check_share(name: str, counts: Sequence[int], num_rows: int, group: ProcessGroup, *, own: bool) -> None:
    require(
        len(counts) == group.size() and min(counts) >= 0,
        f"{name}: counts must have one entry of at least 0 per rank of the group ({group.size()}), got {list(counts)}",
    )
    expected = counts[group.rank()] if own else sum(counts)
    require(
        num_rows == expected,
        f"{name}: counts {list(counts)} announce {expected} rows of rank {group.rank()}, got {num_rows}; "
        "exchange the counts again",
    )


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, counts: list[int], group: ProcessGroup, tally: Tally) -> Tensor:
        ctx.counts, ctx.group, ctx.tally = counts, group, tally
        tally.add(x_RD, [x_RD.shape[0]] * len(counts))
        return _gather_blocks(x_RD, counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.tally.add(grad_RD, ctx.counts, "_grad")
        return _sum_blocks(grad_RD, ctx.counts, ctx.group), None, None, None


class _SumRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, counts: list[int], group: ProcessGroup, tally: Tally) -> Tensor:
        ctx.counts, ctx.group, ctx.tally = counts, group, tally
        tally.add(x_RD, counts)
        return _sum_blocks(x_RD, counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.tally.add(grad_RD, [grad_RD.shape[0]] * len(ctx.counts), "_grad")
        return _gather_blocks(grad_RD, ctx.counts, ctx.group), None, None, None


def _gather_blocks(x_RD: Tensor, counts: list[int], group: ProcessGroup) -> Tensor:
    """Messages between pairs of ranks: collectives that take uneven blocks would want a copy for each rank."""
    out_RD = x_RD.new_empty(sum(counts), *x_RD.shape[1:])
    blocks, mine = out_RD.split(counts), group.rank()
    blocks[mine].copy_(x_RD)
    others = [rank for rank in range(len(counts)) if rank != mine]
    sent = {rank: x_RD.contiguous() for rank in others if counts[mine]}
    _swap(sent, {rank: blocks[rank] for rank in others if counts[rank]}, group)
    return out_RD


def _sum_blocks(x_RD: Tensor, counts: list[int], group: ProcessGroup) -> Tensor:
    blocks, mine = x_RD.split(counts), group.rank()
    others = [rank for rank in range(len(counts)) if rank != mine]
    parts = [x_RD.new_empty(counts[mine], *x_RD.shape[1:]) for _ in counts]
    parts[mine] = blocks[mine]
    sent = {rank: blocks[rank].contiguous() for rank in others if counts[rank]}
    _swap(sent, {rank: parts[rank] for rank in others if counts[mine]}, group)
    total_RD = parts[0].to(torch.promote_types(x_RD.dtype, torch.float32), copy=True)
    for part in parts[1:]:
        total_RD += part
    return total_RD.to(x_RD.dtype)


def _swap(outgoing: dict[int, Tensor], incoming: dict[int, Tensor], group: ProcessGroup) -> None:
    """Send and receive one message per rank of the group, by ascending rank."""
    operations = []
    for peer in range(group.size()):
        if peer in outgoing:
            operations.append(dist.P2POp(dist.isend, outgoing[peer], group=group, group_peer=peer))
        if peer in incoming:
            operations.append(dist.P2POp(dist.irecv, incoming[peer], group=group, group_peer=peer))
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()


def exchange_counts(
    counts_WC: Tensor, group: ProcessGroup, *, counter: TrafficCounter | None = None, purpose: str = "counts"
) -> Tensor:
    """Give row w of ``counts_WC`` (int64 [W, C]) to rank w; row w of the result came from rank w. No gradient.

    Args:
        counts_WC: numbers for each rank.
        group: the process group.
        counter: where its rows and bytes are counted.
        purpose: what they are counted as.

    Raises:
        ValueError: the tensor does not have one row per rank of the group.
    """
    require(
        counts_WC.dim() == 2 and counts_WC.shape[0] == group.size(),
        f"exchange_counts: counts must be [W, C] with W = {group.size()} ranks, got {list(counts_WC.shape)}; "
        "give each rank a row",
    )
    if group.size() == 1:
        return counts_WC.clone()
    Tally(counter, purpose, group).add(counts_WC, [1] * group.size())
    received_WC = torch.empty_like(counts_WC, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received_WC, counts_WC.contiguous(), group=group)
    return received_WC


def all_gather_stack(
    x: Tensor, group: ProcessGroup, *, counter: TrafficCounter | None = None, purpose: str = "offers"
) -> Tensor:
    """``x`` of every rank of the group, stacked in its order: ``[W, *x.shape]``. No gradient.

    Args:
        x: of the same shape on all ranks.
        group: the process group.
        counter: where its rows and bytes are counted, once for each rank they go to.
        purpose: what they are counted as.
    """
    world = group.size()
    if world == 1:
        return x.detach().clone().unsqueeze(0)
    Tally(counter, purpose, group).add(x, [x.shape[0]] * world)
    gathered = x.new_empty(world, *x.shape)
    dist.all_gather(list(gathered.unbind()), x.detach().contiguous(), group=group)
    return gathered


def all_reduce_sum(x: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of ``x`` over the ranks of ``group``, in a new tensor. No gradient."""
    total = x.detach().clone(memory_format=torch.contiguous_format)
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    return total
