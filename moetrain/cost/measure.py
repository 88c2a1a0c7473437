"""Measures what a step's work and bytes cost on this machine: on one rank, in well under a second.

All ranks get the numbers of the first one, to the bit, so that they make the same plans. What is computed is the
caller's: nothing in here knows experts.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from moetrain.cost.step_costs import StepCosts

REPEATS = 11  # of which the median counts
ROWS = 256  # of the message by which rows are measured
LARGE_BYTES = 1 << 22  # of the message by which bytes are measured
DIGITS = 3


@dataclass(frozen=True, slots=True)
class LayerSample:
    """One MoE layer's work, as far as one rank can measure it alone.

    Attributes:
        compute: forward and backward pass of ``num_pairs`` pairs.
        num_pairs: (token, expert) pairs of that.
        pair_flops: floating-point operations of one pair, forward and backward.
        other_flops: of what else a layer does with a micro-batch, as attention.
        hides: whether that other work hides transfers; gloo moves bytes on the cores that compute, and hides none.
        row_bytes: of one token.
        expert_bytes: what one replica moves: weights in, gradients out.
    """

    compute: Callable[[], object]
    num_pairs: int
    pair_flops: float
    other_flops: float
    hides: bool
    row_bytes: int
    expert_bytes: int


@dataclass(frozen=True, slots=True)
class Peers:
    """Positions in the group of the ranks that the first one exchanges messages with; None where there is no such one.

    Attributes:
        near: a rank of its own node.
        far: a rank of another node.
    """

    near: int | None
    far: int | None


def measure_costs(sample: LayerSample, peers: Peers, group: ProcessGroup, device: torch.device) -> StepCosts:
    """Measure on the first rank of ``group``, and tell all. Collective; the other ranks wait or answer messages.

    A row goes there and back, and so does its gradient: four transfers. Where a node or all other nodes have no rank to
    ask, what is known of the other kind of link is taken for both; where there is no other rank, moving costs nothing.

    Args:
        sample: what to compute.
        peers: whom to send to.
        group: of all ranks.
        device: where messages lie.
    """
    found_6 = torch.zeros(6, dtype=torch.float64, device=device)
    is_first = group.rank() == 0
    pair_s = median_s(sample.compute, device) / sample.num_pairs if is_first else 0.0
    near_row_s, near_byte_s = _link(peers.near, sample.row_bytes, group, device)
    far_row_s, far_byte_s = _link(peers.far, sample.row_bytes, group, device)
    if is_first:
        overlap_s = sample.other_flops * pair_s / sample.pair_flops if sample.hides else 0.0
        times = (pair_s, near_row_s or far_row_s, far_row_s or near_row_s, far_byte_s or near_byte_s)
        numbers = (*map(rounded, times), float(sample.expert_bytes), rounded(overlap_s))
        found_6.copy_(torch.tensor(numbers, dtype=torch.float64))
    if group.size() > 1:
        dist.broadcast(found_6, group=group, group_src=0)
    return StepCosts(*found_6.tolist())


def median_s(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that ``work`` takes: of several runs the median, after one that nobody counts."""
    work()
    seconds = []
    for _ in range(REPEATS):
        begun = now(device)
        work()
        seconds.append(now(device) - begun)
    return statistics.median(seconds)


def rounded(number: float) -> float:
    """To three digits: no more is known.

    >>> rounded(0.00123456), rounded(98765.0)
    (0.00123, 98800.0)
    """
    return float(f"{number:.{DIGITS}g}")


def _link(peer: int | None, row_bytes: int, group: ProcessGroup, device: torch.device) -> tuple[float, float]:
    """Seconds of a row (four transfers) and of a byte (one), on the first rank; zeros on others and without a peer."""
    if peer is None or group.rank() not in (0, peer):
        return 0.0, 0.0
    rows_s, large_s = (message_s(size, peer, group, device) for size in (ROWS * row_bytes, LARGE_BYTES))
    return 4 * rows_s / ROWS, large_s / LARGE_BYTES


def message_s(num_bytes: int, peer: int, group: ProcessGroup, device: torch.device) -> float:
    """Seconds of one message from the first rank of ``group`` to ``peer``, both of which call it; 0 on the latter."""
    message = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    both_ways_s = median_s(lambda: _there_and_back(message, peer, group), device)
    return both_ways_s / 2 if group.rank() == 0 else 0.0


def _there_and_back(message: torch.Tensor, peer: int, group: ProcessGroup) -> None:
    if group.rank() == 0:
        dist.send(message, group=group, group_dst=peer)
        dist.recv(message, group=group, group_src=peer)
    else:
        dist.recv(message, group=group, group_src=0)
        dist.send(message, group=group, group_dst=0)


def now(device: torch.device) -> float:
    """Seconds on this machine's clock, once ``device`` has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
