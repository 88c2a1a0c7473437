"""attend against causal_attention: one square, and all calls of a gang's ring together.

Run: python benchmarks/bench_attend.py

4,096 tokens, 8 query and 2 key heads of 128, one thread. A gang of d ranks cuts the tokens in 2d parts at p n / 2d, and
rank r holds parts r and 2d - 1 - r (zigzag, as Megatron-Core's context parallelism). Its own tokens are one square; to
those of an earlier rank all of its queries attend, but to the early part alone; to those of a later rank its late part
does, to both. What all ranks' steps take is compared with one undivided call, in CPU time of the thread. Results are
compared before anything is timed.
"""

import time
from collections.abc import Callable
from itertools import pairwise, product

import torch
from timing import Row, arguments, report
from torch import Tensor

from moetrain.ops import attend, attend_backward
from moetrain.ops.native import OPS

LENGTH, HEADS, KEY_HEADS, HEAD_DIM = 4096, 8, 2, 128
GANGS = (4, 8)

# A rank with a range of its queries, the rank whose keys it has with a range of these, and whether they are a square.
Step = tuple[int, Tensor, int, Tensor, bool]
Tensors = dict[str, Tensor]


def held_by_ranks(length: int, num_ranks: int) -> list[tuple[Tensor, int]]:
    """The tokens of each rank, and how many of them are of the early part."""
    parts = list(pairwise(p * length // (2 * num_ranks) for p in range(2 * num_ranks + 1)))
    pairs = [(torch.arange(*parts[r]), torch.arange(*parts[-1 - r])) for r in range(num_ranks)]
    return [(torch.cat(pair), len(pair[0])) for pair in pairs]


def ring_steps(held: list[tuple[Tensor, int]]) -> list[Step]:
    """All steps of all ranks, each a square of a rank's own tokens or a rectangle; in the order of the ring."""
    steps: list[Step] = []
    for hop, rank in product(range(len(held)), range(len(held))):
        source = (rank - hop) % len(held)
        (mine, early), (theirs, their_early) = held[rank], held[source]
        if source > rank:
            steps.append((rank, between(early, len(mine)), source, between(0, len(theirs)), False))
        else:
            keys = between(0, their_early if source < rank else len(theirs))
            steps.append((rank, between(0, len(mine)), source, keys, source == rank))
    return steps


def between(begin: int, end: int) -> Tensor:
    return torch.tensor([[begin, end]], dtype=torch.int32)


def make(dtype: torch.dtype) -> Tensors:
    random = torch.Generator().manual_seed(0)
    heads = {"q": HEADS, "k": KEY_HEADS, "v": KEY_HEADS, "dout": HEADS}
    return {name: torch.randn(LENGTH, n, HEAD_DIM, generator=random).to(dtype) for name, n in heads.items()}


class Gang:
    """Ranks one after the other in one process, each with its own tokens: what is timed copies none."""

    def __init__(self, x: Tensors, num_ranks: int) -> None:
        held = held_by_ranks(LENGTH, num_ranks)
        self.tokens = [tokens for tokens, _ in held]
        self.steps = ring_steps(held)
        self.x = [{name: of[tokens] for name, of in x.items()} for tokens in self.tokens]
        self.seen = self.forward()

    def forward(self) -> list[tuple[Tensor, Tensor]]:
        """Return out and lse of each rank."""
        seen: dict[int, tuple[Tensor, Tensor]] = {}
        for rank, range_q, source, range_k, causal in self.steps:
            out, lse = seen.get(rank, (None, None))
            of = self.x[source]
            seen[rank] = attend(self.x[rank]["q"], of["k"], of["v"], range_q, range_k, causal=causal, out=out, lse=lse)
        return [seen[rank] for rank in range(len(self.x))]

    def backward(self) -> list[list[Tensor]]:
        """Return dq, dk, dv of each rank."""
        sums = [[torch.zeros_like(of[name], dtype=torch.float32) for name in ("q", "k", "v")] for of in self.x]
        for rank, range_q, source, range_k, causal in self.steps:
            mine, of = self.x[rank], self.x[source]
            inputs = mine["dout"], mine["q"], of["k"], of["v"], *self.seen[rank], range_q, range_k
            _, dk, dv = sums[source]
            attend_backward(*inputs, causal=causal, dq=sums[rank][0], dk=dk, dv=dv)
        return sums

    def answers(self) -> list[Tensor]:
        """Put out, dq, dk and dv of all ranks in the order of tokens."""
        by_rank = [(out, *grads) for (out, _), grads in zip(self.seen, self.backward(), strict=True)]
        order = torch.cat(self.tokens).argsort()
        return [torch.cat(parts)[order] for parts in zip(*by_rank, strict=True)]


def undivided(x: Tensors) -> tuple[Callable[[], tuple[Tensor, ...]], Callable[[], tuple[Tensor, ...]]]:
    """Forward and backward of causal_attention over all tokens."""
    q, k, v, dout = (x[name] for name in ("q", "k", "v", "dout"))
    document = torch.zeros(LENGTH, dtype=torch.int32), torch.tensor([0, LENGTH], dtype=torch.int32)
    scale = HEAD_DIM**-0.5
    y, lse = OPS.causal_attention(q, k, v, *document, scale)
    return (
        lambda: OPS.causal_attention(q, k, v, *document, scale),
        lambda: OPS.causal_attention_backward(dout, q, k, v, y, lse, *document, scale),
    )


def alternate(case: str, calls: dict[str, Callable[[], object]], rounds: int) -> Row:
    """The least CPU time of the thread over rounds, in which each competitor has its turn."""
    taken_ms: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            taken_ms[name].append((time.thread_time() - start) * 1e3)
    least = {name: min(times) for name, times in taken_ms.items()}
    return Row(case, least, least)


def bench(dtype: torch.dtype, rounds: int) -> list[Row]:
    x = make(dtype)
    forward, backward = undivided(x)
    gangs = {"square": Gang(x, 1)} | {f"gang of {d}": Gang(x, d) for d in GANGS}
    want = [forward()[0], *backward()]
    for gang in gangs.values():
        for got, expected in zip(gang.answers(), want, strict=True):
            bound = 32 * torch.finfo(dtype).eps * max(1.0, expected.abs().max().item())
            torch.testing.assert_close(got, expected.float(), rtol=0, atol=bound)
    name = str(dtype).removeprefix("torch.")
    forwards: dict[str, Callable[[], object]] = {"undivided": forward} | {n: g.forward for n, g in gangs.items()}
    backwards: dict[str, Callable[[], object]] = {"undivided": backward} | {n: g.backward for n, g in gangs.items()}
    return [alternate(f"{name}, forward", forwards, rounds), alternate(f"{name}, backward", backwards, rounds)]


def main() -> None:
    chosen = arguments(__doc__ or "")
    torch.set_num_threads(1)
    rows = [row for dtype in (torch.float32, torch.bfloat16) for row in bench(dtype, chosen.rounds)]
    report("attend", rows, save_as=chosen.save_as)


if __name__ == "__main__":
    main()
