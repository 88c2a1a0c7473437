"""Attention over a gang against one process: values, gradients, bytes; and what must be noticed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import Tensor

from moetrain.mesh.traffic import TrafficCounter
from moetrain.ops import attend
from moetrain.ops.reference_attend import attend_reference
from moetrain.sequence import ring as ring_module
from moetrain.sequence.ring import GroupRing, Ring, ring_attention
from moetrain.sequence.zigzag import Seen, Zigzag
from moetrain.sim.ring import ThreadRing, run_on_ring

HEADS, KEY_HEADS, DIM = 4, 2, 8


def tokens_of(lengths: list[int], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the output's gradient of all sequences, end to end."""
    random = torch.Generator().manual_seed(sum(lengths))
    return [
        torch.randn(sum(lengths), heads, DIM, generator=random, dtype=torch.float64).to(dtype)
        for heads in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)
    ]


def one_process(lengths: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients by the definition, in float64."""
    q, k, v, dy = (x.double() for x in tokens_of(lengths, dtype))
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    token = torch.arange(sum(lengths))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, _ = attend_reference(q, k, v, (sequence[:, None] == sequence) & (token <= token[:, None]))
    return [out.detach(), *torch.autograd.grad(out, leaves, dy)]


def mine_of(parts: Zigzag, rank: int) -> Tensor:
    """The rank's tokens among all."""
    starts = [sum(parts.num_tokens[:i]) for i in range(len(parts.num_tokens))]
    pieces = [torch.arange(*part) + start for i, start in enumerate(starts) for part in parts.parts(i, rank)]
    return torch.cat(pieces)


def on_rank(ring: Ring, lengths: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of this rank's tokens."""
    parts = Zigzag(lengths, ring.size)
    q, k, v, dy = (x[mine_of(parts, ring.rank)] for x in tokens_of(lengths, dtype))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    y = ring_attention(q, k, v, parts, ring)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def largest_errors(found: list[list[Tensor]], lengths: list[int], dtype: torch.dtype) -> list[float]:
    """Of output and gradients, relative to the largest value of each."""
    want = one_process(lengths, dtype)
    parts = Zigzag(lengths, len(found))
    errors = [0.0] * len(want)
    for rank, mine in enumerate(found):
        place = mine_of(parts, rank)
        for i, (got, all_of_it) in enumerate(zip(mine, want, strict=True)):
            if len(place):
                scale = max(1.0, float(all_of_it.abs().max()))
                errors[i] = max(errors[i], float((got.double() - all_of_it[place]).abs().max()) / scale)
    return errors


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("lengths", [[1], [11], [130, 3, 40]])
def test_a_gang_computes_what_one_process_does(size: int, lengths: list[int]) -> None:
    found = run_on_ring(size, lambda ring: on_rank(ring, lengths, torch.float64))
    assert max(largest_errors(found, lengths, torch.float64)) < 1e-12


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_other_types(dtype: torch.dtype, allowed: float) -> None:
    found = run_on_ring(3, lambda ring: on_rank(ring, [130, 40], dtype))
    assert all(x.dtype == dtype for mine in found for x in mine)
    assert max(largest_errors(found, [130, 40], dtype)) < allowed


def test_messages_are_as_many_bytes_as_the_gang_needs() -> None:
    """Keys and values leave a rank d - 1 times in each pass, their gradients d - 1 times, in float32."""
    parts = Zigzag([50, 7], 4)

    def body(ring: ThreadRing) -> int:
        on_rank(ring, [50, 7], torch.bfloat16)
        return ring.sent

    sent = run_on_ring(4, body)
    row = 2 * KEY_HEADS * DIM
    for rank in range(4):
        by_values = sum(parts.size((rank - step) % 4) for step in range(3))
        by_gradients = sum(parts.size((rank - step) % 4) for step in range(1, 4))
        assert sent[rank] == row * (2 * 2 * by_values + 4 * by_gradients)


def local_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(*args: Any, out: Tensor | None, lse: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
        _, local = attend(*args, **options)
        return attend(*args, out=out, lse=lse, **options)[0], local

    monkeypatch.setattr(ring_module, "attend", forgets)


def drop_ring_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(parts: Zigzag, rank: int, source: int) -> Seen:
        found = original(parts, rank, source)
        if (rank, source) != (2, 0):
            return found
        return Seen(torch.zeros_like(found.range_q_S2), torch.zeros_like(found.range_k_S2), found.causal)

    original = Zigzag.seen
    monkeypatch.setattr(Zigzag, "seen", seen)


def swap_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Zigzag.seen
    monkeypatch.setattr(Zigzag, "seen", lambda parts, rank, source: original(parts, *sorted((rank, source))))


@pytest.mark.parametrize("break_it", [local_lse, drop_ring_step, swap_parts])
def test_mistakes_are_noticed(monkeypatch: pytest.MonkeyPatch, break_it: Callable[[pytest.MonkeyPatch], None]) -> None:
    break_it(monkeypatch)
    found = run_on_ring(3, lambda ring: on_rank(ring, [60], torch.float64))
    assert max(largest_errors(found, [60], torch.float64)) > 1e-3


def test_gradients_that_stay_where_they_are_found_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moetrain.sequence.ring._Returning.join", lambda self, own: own)
    errors = largest_errors(run_on_ring(3, lambda ring: on_rank(ring, [60], torch.float64)), [60], torch.float64)
    assert max(errors[:2]) < 1e-12, "the output and the gradient of q are right"
    assert min(errors[2:]) > 1e-2


def gangs_body(rank: int, gangs: list[tuple[int, ...]], lengths: list[list[int]]) -> list[tuple[list[Tensor], int]]:
    """This rank's part of every gang that it is in, one after the other, on one group."""
    results = []
    for gang, tokens in zip(gangs, lengths, strict=True):
        if rank in gang:
            counter = TrafficCounter()
            ring = GroupRing(dist.group.WORLD, gang, counter=counter)  # type: ignore[arg-type]
            results.append((on_rank(ring, tokens, torch.float64), counter.bytes.get("ring", 0)))
    return results


@pytest.mark.dist
def test_gangs_of_one_group_of_ranks() -> None:
    """Three and one, then two and two, one of them in the other order, then all; some ranks have no token."""
    gangs = [(0, 1, 3), (2,), (2, 0), (1, 3), (0, 1, 2, 3)]
    lengths = [[41, 2], [17], [9], [1], [64]]
    found = run_on_ranks(4, gangs_body, gangs, lengths)
    for i, (gang, tokens) in enumerate(zip(gangs, lengths, strict=True)):
        before = [sum(rank in one for one in gangs[:i]) for rank in gang]
        of_gang = [found[rank][at] for rank, at in zip(gang, before, strict=True)]
        assert max(largest_errors([tensors for tensors, _ in of_gang], tokens, torch.float64)) < 1e-12
        sent = sum(num_bytes for _, num_bytes in of_gang)
        assert sent == 3 * (len(gang) - 1) * sum(tokens) * 2 * KEY_HEADS * DIM * 8


def test_bad_input_is_named() -> None:
    parts = Zigzag([6], 2)
    q, k, v, _ = tokens_of([3], torch.float32)

    class Alone:
        rank, size = 0, 1

    class Two:
        rank, size = 0, 2

    with pytest.raises(ValueError, match="as many ranks as share the sequences, 2, got 1"):
        ring_attention(q, k, v, parts, Alone())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must have the 3 tokens of rank 0 of its gang, got \[3, 3, 2\]"):
        ring_attention(q, k, v[:2], parts, Two())  # type: ignore[arg-type]
