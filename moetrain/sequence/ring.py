"""Attention over a gang: keys and values go round a ring of ranks, each of which adds what its queries see of them.

Ring attention (2310.01889) over zigzag parts (``moetrain.sequence.zigzag``), in d steps. Shapes: T tokens of a rank, H
query heads, G key heads, d elements of a head. In step t rank r has the keys and values of rank s = r - t:

                   forward                                       backward
    under way      these to r + 1, those of s - 1 from r - 1     the same, round again
    computed       attend(q, k_s, v_s), continuing out and lse   gradients of q; of k_s and v_s, added to what the ranks
                                                                 before have found, which comes a step behind them and
                                                                 ends at s

What a rank does itself for its own keys needs no message, so that each rank sends d - 1 times. Sums are of at least
fp32 and in the order of the ring, so that nothing depends on when a message comes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from moetrain.config.errors import require
from moetrain.mesh.traffic import TrafficCounter
from moetrain.ops import attend, attend_backward
from moetrain.sequence.zigzag import Zigzag

Value = TypeVar("Value")


class Once(Protocol):
    """Keeps a value by its name, so that who computes again finds it."""

    def __call__(self, name: str, make: Callable[[], Value], /) -> Value:
        """What ``make`` gave the first time."""


def once_each_time(_: str, make: Callable[[], Value], /) -> Value:
    """``make()``: nothing is kept."""
    return make()


class Arriving(Protocol):
    """A message from the rank before, and one to the rank behind, under way."""

    def wait(self) -> None:
        """Until the one has come and the other may be overwritten."""


class Ring(Protocol):
    """Ranks in a ring; ``rank`` is this one's place among ``size``."""

    rank: int
    size: int

    def exchange(self, send: Tensor, receive: Tensor) -> Arriving:
        """Start to send to the rank behind and to receive from the one before. Both know all sizes; 0 is one too."""


@dataclass(slots=True, eq=False)
class _Works:
    works: list[dist.Work]
    moving: tuple[Tensor, Tensor]  # kept: a message's memory must outlive it

    def wait(self) -> None:
        for work in self.works:
            work.wait()


class GroupRing:
    """The ring of some ranks of a process group, by messages between two.

    The group is one communicator for all gangs of a mesh (making one for each would cost memory and seconds), and its
    messages are those of rings alone, so that their order on each rank is that of its gangs.
    """

    def __init__(self, group: ProcessGroup, ranks: tuple[int, ...], *, counter: TrafficCounter | None = None) -> None:
        """Find this rank's place.

        Args:
            group: of all that may share a gang.
            ranks: of the gang, in the group's numbers, in the order of the ring.
            counter: counts what is sent, as ``"ring"``.

        Raises:
            ValueError: this rank is not in the gang.
        """
        mine = group.rank()
        require(mine in ranks, f"GroupRing: ranks must have this one, {mine}, got {list(ranks)}; leave the lane empty")
        self.rank, self.size = ranks.index(mine), len(ranks)
        self._group = group
        self._behind = dist.get_global_rank(group, ranks[(self.rank + 1) % self.size])
        self._before = dist.get_global_rank(group, ranks[self.rank - 1])
        self._counter = counter

    def exchange(self, send: Tensor, receive: Tensor) -> Arriving:
        """See ``Ring``."""
        messages = []
        if send.numel():
            messages.append(dist.P2POp(dist.isend, send, self._behind, self._group))
            if self._counter is not None:
                self._counter.add("ring", send.shape[1], send.nbytes)
        if receive.numel():
            messages.append(dist.P2POp(dist.irecv, receive, self._before, self._group))
        return _Works(dist.batch_isend_irecv(messages) if messages else [], (send, receive))


def ring_attention(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    parts: Zigzag,
    ring: Ring,
    *,
    scale: float | None = None,
    once: Once = once_each_time,
) -> Tensor:
    """Attend from this rank's tokens to all tokens before them in their sequences, wherever these are. Collective.

    Differentiable once in q, k and v. Keeps its inputs, out and lse, nothing of other ranks.

    Args:
        q_THd: bf16, fp16, fp32 or fp64, of the tokens that ``parts`` gives to this rank.
        k_TGd: of q's dtype; G divides H.
        v_TGd: likewise.
        parts: of the gang's sequences.
        ring: its ranks, as many as ``parts`` has.
        scale: of the scores; 1 / sqrt(d) if left out.
        once: keeps what the ring gave, where activations are recomputed: the ring does not run a second time, and no
            rank of it need compute again when this one does.

    Returns:
        [T, H, d] of q's dtype.

    Raises:
        ValueError: the ring is of another size than ``parts``, or q, k and v have other tokens.
    """
    require(
        ring.size == parts.num_ranks,
        f"ring_attention: the ring must have as many ranks as share the sequences, {parts.num_ranks}, got {ring.size}",
    )
    mine = parts.size(ring.rank)
    sizes = [len(x) for x in (q_THd, k_TGd, v_TGd)]
    require(
        sizes == [mine] * 3,
        f"ring_attention: q, k and v must have the {mine} tokens of rank {ring.rank} of its gang, got {sizes}",
    )
    y_THd: Tensor = _RingAttention.apply(q_THd, k_TGd, v_TGd, parts, ring, scale, once)
    return y_THd


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q_THd: Tensor,
        k_TGd: Tensor,
        v_TGd: Tensor,
        parts: Zigzag,
        ring: Ring,
        scale: float | None,
        once: Once,
    ) -> Tensor:
        out, lse = once("ring", lambda: _attend_to_all(q_THd, k_TGd, v_TGd, parts, ring, scale))
        ctx.parts, ctx.ring, ctx.scale = parts, ring, scale
        ctx.save_for_backward(q_THd, k_TGd, v_TGd, out, lse)
        return out.to(q_THd.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_THd: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None, None]:
        q_THd, k_TGd, v_TGd, out, lse = ctx.saved_tensors
        parts, ring = ctx.parts, ctx.ring
        dy_THd = dy_THd.contiguous()
        dq = torch.zeros_like(out)
        own, returning = None, _Returning(parts, ring, k_TGd, out.dtype)
        for source, pair in _Round(parts, ring, torch.stack((k_TGd, v_TGd))):
            found = pair.new_zeros(pair.shape, dtype=out.dtype)
            seen = parts.seen(ring.rank, source)
            attend_backward(
                dy_THd,
                q_THd,
                pair[0],
                pair[1],
                out,
                lse,
                seen.range_q_S2,
                seen.range_k_S2,
                causal=seen.causal,
                scale=ctx.scale,
                dq=dq,
                dk=found[0],
                dv=found[1],
            )
            if source == ring.rank:
                own = found
            else:
                returning.add(source, found)
        assert own is not None
        dk, dv = returning.join(own).to(q_THd.dtype)
        return dq.to(q_THd.dtype), dk, dv, None, None, None, None


def _attend_to_all(
    q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, parts: Zigzag, ring: Ring, scale: float | None
) -> tuple[Tensor, Tensor]:
    """``out`` [T, H, d] and ``lse`` [H, T] of this rank's queries, of at least fp32."""
    out = lse = None
    for source, pair in _Round(parts, ring, torch.stack((k_TGd, v_TGd))):
        seen = parts.seen(ring.rank, source)
        out, lse = attend(
            q_THd,
            pair[0],
            pair[1],
            seen.range_q_S2,
            seen.range_k_S2,
            causal=seen.causal,
            scale=scale,
            out=out,
            lse=lse,
        )
    assert out is not None
    assert lse is not None
    return out, lse


class _Round:
    """Every rank's keys and values as they come by: (rank, [2, tokens, G, d]), this rank's first.

    The next ones are under way while the caller computes with these.
    """

    def __init__(self, parts: Zigzag, ring: Ring, own: Tensor) -> None:
        self._parts, self._ring, self._now, self._step = parts, ring, own.contiguous(), 0
        self._arriving: tuple[Arriving, Tensor] | None = None

    def __iter__(self) -> "_Round":
        return self

    def __next__(self) -> tuple[int, Tensor]:
        ring = self._ring
        if self._step == ring.size:
            raise StopIteration
        if self._arriving is not None:
            arriving, coming = self._arriving
            arriving.wait()
            self._now, self._arriving = coming, None
        source = (ring.rank - self._step) % ring.size
        if self._step + 1 < ring.size:
            coming = _empty_of(self._parts, (source - 1) % ring.size, self._now)
            self._arriving = ring.exchange(self._now, coming), coming
        self._step += 1
        return source, self._now


class _Returning:
    """Gradients of other ranks' keys and values on their way home, one step behind these themselves."""

    def __init__(self, parts: Zigzag, ring: Ring, k_TGd: Tensor, dtype: torch.dtype) -> None:
        self._parts, self._ring = parts, ring
        self._like = k_TGd.new_empty((0, *k_TGd.shape), dtype=dtype)
        self._arriving: tuple[Arriving, Tensor] | None = None

    def add(self, source: int, found: Tensor) -> None:
        """Add what this rank has found for ``source`` to what the ranks before have, and send it on."""
        if self._arriving is not None:
            arriving, before = self._arriving
            arriving.wait()
            found += before
        coming = _empty_of(self._parts, (source - 1) % self._ring.size, self._like)
        self._arriving = self._ring.exchange(found, coming), coming

    def join(self, own: Tensor) -> Tensor:
        """What all ranks have found for this one."""
        if self._arriving is None:
            return own
        arriving, others = self._arriving
        arriving.wait()
        return own + others


def _empty_of(parts: Zigzag, rank: int, like: Tensor) -> Tensor:
    return like.new_empty((2, parts.size(rank), *like.shape[2:]))
