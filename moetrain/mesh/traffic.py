"""What leaves a rank: rows and bytes by purpose, and what of it crosses to another node."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


@dataclass(slots=True)
class TrafficCounter:
    """What this rank has sent to other ranks, by purpose; what stays on the rank is not counted.

    Purposes in use: ``"dispatch"`` and ``"combine"`` (token rows, their gradients under ``"dispatch_grad"`` and
    ``"combine_grad"``), ``"counts"``, ``"pairs"`` and ``"weights"`` (what goes with them), ``"*_inside"`` (the
    same, on the second hop of a two-level dispatch), ``"etp_*"`` (the same between shards of experts), ``"offers"`` (of
    token rounding), ``"gather"`` and ``"scatter"`` (chunks of expert weights and of their gradients), ``"tp_gather"``
    and ``"tp_scatter"`` (tokens of a tp group), ``"ring"`` (keys and values of a gang, and their gradients),
    ``"dense_grad"``, ``"inspect"`` (whole experts, for checks); ``"evaluation_*"``: the same, sent by an evaluation.

    Args:
        rows: by purpose.
        bytes: by purpose.
        between_nodes: those of ``bytes`` that go to a rank of another node, where ``ranks_per_node`` is given;
            dense gradients, whose routes are the library's business, are not among them.
        ranks_per_node: ranks of one machine, machines being filled in rank order; None where nobody asks.
    """

    rows: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    between_nodes: dict[str, int] = field(default_factory=dict)
    ranks_per_node: int | None = None
    _elsewhere: dict[tuple[int, ...], tuple[bool, ...]] = field(default_factory=dict, init=False, repr=False)
    _prefix: str = field(default="", init=False, repr=False)

    def add(self, purpose: str, rows: int, num_bytes: int, between_nodes: int = 0) -> None:
        """Count ``rows`` rows of ``num_bytes`` bytes in all, ``between_nodes`` of these to other nodes."""
        purpose = self._prefix + purpose
        self.rows[purpose] = self.rows.get(purpose, 0) + rows
        self.bytes[purpose] = self.bytes.get(purpose, 0) + num_bytes
        if between_nodes:
            self.between_nodes[purpose] = self.between_nodes.get(purpose, 0) + between_nodes

    def add_rows(self, purpose: str, row_bytes: int, counts: Sequence[int], group: ProcessGroup) -> None:
        """Count ``counts[w]`` rows of ``row_bytes`` bytes for each rank w of ``group``; own ones stay."""
        mine = group.rank()
        rows = sum(counts) - counts[mine]
        crossing = 0
        if self.ranks_per_node is not None:
            crossing = sum(count for count, other in zip(counts, self._on_other_nodes(group), strict=True) if other)
        self.add(purpose, rows, rows * row_bytes, crossing * row_bytes)

    @contextmanager
    def apart(self, name: str) -> Iterator[None]:
        """Meanwhile, count what is sent for any purpose as ``f"{name}_{purpose}"``."""
        outer, self._prefix = self._prefix, f"{self._prefix}{name}_"
        try:
            yield
        finally:
            self._prefix = outer

    def reset(self) -> None:
        """Forget everything counted so far."""
        self.rows.clear()
        self.bytes.clear()
        self.between_nodes.clear()

    def _on_other_nodes(self, group: ProcessGroup) -> tuple[bool, ...]:
        ranks = tuple(dist.get_process_group_ranks(group))
        if ranks not in self._elsewhere:
            assert self.ranks_per_node is not None
            nodes = [rank // self.ranks_per_node for rank in ranks]
            self._elsewhere[ranks] = tuple(node != nodes[group.rank()] for node in nodes)
        return self._elsewhere[ranks]


@dataclass(frozen=True, slots=True)
class Tally:
    """Where the rows of one collective are counted, if anywhere."""

    counter: TrafficCounter | None
    purpose: str
    group: ProcessGroup

    def add(self, x_RD: Tensor, counts: Sequence[int], suffix: str = "") -> None:
        """Count ``counts[w]`` rows like those of ``x_RD`` for each rank w of the group."""
        if self.counter is not None:
            row_bytes = x_RD.shape[1:].numel() * x_RD.element_size()
            self.counter.add_rows(self.purpose + suffix, row_bytes, counts, self.group)
