"""Attention of a gang on one device: its ranks are threads that hand each other keys and values.

    python benchmarks/gpu_ring.py [--device cuda] [--rounds N] [--save-as TAG]

First gangs of 3 and 8 ranks in bf16 against one process in fp64, values and gradients, on sequences of uneven lengths:
whoever is off by more than ``ALLOWED`` of the largest value fails the run. Then what all calls of a ring take over the
undivided call, as ``bench_attend.py`` has it on CPUs.
"""

import sys
from collections.abc import Callable

import torch
from bench_attend import between, held_by_ranks, ring_steps
from timing import Row, arguments, compare, report
from torch import Tensor

from moetrain.ops import attend, attend_backward
from moetrain.ops.reference_attend import attend_reference
from moetrain.sequence.ring import Ring, ring_attention
from moetrain.sequence.zigzag import Zigzag
from moetrain.sim.ring import run_on_ring

GANGS = (3, 8)
LENGTHS = (1500, 333, 1, 50)
HEADS, KEY_HEADS, HEAD_DIM = 8, 2, 128
ALLOWED = 2e-2
TIMED = 16384  # tokens


def tokens(count: int, device: str) -> list[Tensor]:
    """q, k, v and the output's gradient, in bf16."""
    random = torch.Generator().manual_seed(0)
    heads = (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    return [torch.randn(count, n, HEAD_DIM, generator=random).to(device, torch.bfloat16) for n in heads]


def errors_of_gang(size: int, device: str) -> list[float]:
    """Of output and gradients of q, k and v: the largest, over the largest value."""
    q, k, v, dy = tokens(sum(LENGTHS), device)
    parts = Zigzag(LENGTHS, size)
    starts = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]

    def place_of(rank: int) -> Tensor:
        ranges = [torch.arange(*part) + start for i, start in enumerate(starts) for part in parts.parts(i, rank)]
        return torch.cat(ranges).to(device)

    def on_rank(ring: Ring) -> list[Tensor]:
        place = place_of(ring.rank)
        leaves = [x[place].requires_grad_() for x in (q, k, v)]
        y = ring_attention(leaves[0], leaves[1], leaves[2], parts, ring)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy[place])]

    sequence = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).to(device)
    token = torch.arange(sum(LENGTHS), device=device)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out, _ = attend_reference(
        leaves[0], leaves[1], leaves[2], (sequence[:, None] == sequence) & (token <= token[:, None])
    )
    wanted = [out.detach(), *torch.autograd.grad(out, leaves, dy.double())]
    found = run_on_ring(size, on_rank)
    errors = [0.0] * len(wanted)
    for rank, mine in enumerate(found):
        for i, (got, all_of_it) in enumerate(zip(mine, wanted, strict=True)):
            off = (got.double() - all_of_it[place_of(rank)]).abs().max()
            errors[i] = max(errors[i], float(off / all_of_it.abs().max()))
    return errors


def timed(size: int, count: int, device: str, rounds: int) -> list[Row]:
    """Forward and backward, of all ranks one after the other; the undivided call is the first competitor."""
    q, k, v, dy = tokens(count, device)
    whole = between(0, count)
    out, lse = attend(q, k, v, whole, whole, causal=True)
    held = [place.to(device) for place, _ in held_by_ranks(count, size)]
    mine = [[x[place].contiguous() for x in (q, k, v, dy)] for place in held]
    steps = ring_steps(held_by_ranks(count, size))
    of_ranks = [(out[place].contiguous(), lse[:, place].contiguous()) for place in held]

    def forward() -> list[tuple[Tensor, Tensor]]:
        found: list[tuple[Tensor, Tensor] | None] = [None] * size
        for rank, range_q, source, range_k, causal in steps:
            begun, logs = found[rank] or (None, None)
            _, k_mine, v_mine, _ = mine[source]
            found[rank] = attend(mine[rank][0], k_mine, v_mine, range_q, range_k, causal=causal, out=begun, lse=logs)
        return [one for one in found if one is not None]

    def backward_of(call: Callable[..., None], batch: list[list[Tensor]]) -> list[list[Tensor]]:
        grads = [[torch.zeros_like(x, dtype=torch.float32) for x in one[:3]] for one in batch]
        call(grads)
        return grads

    def whole_backward(grads: list[list[Tensor]]) -> None:
        dq, dk, dv = grads[0]
        attend_backward(dy, q, k, v, out, lse, whole, whole, causal=True, dq=dq, dk=dk, dv=dv)

    def ring_backward(grads: list[list[Tensor]]) -> None:
        for rank, range_q, source, range_k, causal in steps:
            attend_backward(
                mine[rank][3], mine[rank][0], mine[source][1], mine[source][2], *of_ranks[rank], range_q, range_k,
                causal=causal, dq=grads[rank][0], dk=grads[source][1], dv=grads[source][2],
            )  # fmt: skip

    name = f"gang of {size}, {count:,} tokens"
    return [
        compare(
            f"forward, {name}",
            {"undivided": lambda: attend(q, k, v, whole, whole, causal=True), "ring": forward},
            rounds=rounds,
        ),
        compare(
            f"backward, {name}",
            {
                "undivided": lambda: backward_of(whole_backward, [[q, k, v]]),
                "ring": lambda: backward_of(ring_backward, mine),
            },
            rounds=rounds,
        ),
    ]


def main() -> int:
    chosen = arguments((__doc__ or "").splitlines()[0])
    failed = False
    for size in GANGS:
        errors = errors_of_gang(size, chosen.device)
        failed |= not max(errors) <= ALLOWED
        told = ", ".join(f"{name} {error:.1e}" for name, error in zip(("y", "dq", "dk", "dv"), errors, strict=True))
        print(f"gang of {size} in bf16 against one process in fp64: {told}", flush=True)
    count = TIMED if chosen.device != "cpu" else TIMED // 16
    rows = [row for size in GANGS for row in timed(size, count, chosen.device, chosen.rounds)]
    report("ring", rows, save_as=chosen.save_as)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
