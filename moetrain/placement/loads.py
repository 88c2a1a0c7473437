"""Counts what was routed where, for whoever plans placements. Shapes: L MoE layers, E experts, N nodes of the pool."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class ExpertLoads:
    """Pairs of this rank's tokens for each layer's experts, after all rules, since they were last taken.

    Training micro-batches alone are counted, each once.
    """

    def __init__(self, layers: Sequence[int], num_experts: int, device: torch.device | str = "cpu") -> None:
        """All zero; ``layers`` are the MoE layers that this rank has."""
        self._count_LE = torch.zeros(len(layers), num_experts, dtype=torch.int32, device=device)
        self._taken_LE = torch.zeros_like(self._count_LE)
        self._row_of = {layer: row for row, layer in enumerate(layers)}

    @torch.no_grad()
    def add(self, layer: int, offset_E1: Tensor) -> None:
        """Count a micro-batch of one layer: pairs of expert e are ``offset_E1[e] : offset_E1[e + 1]``."""
        self._count_LE[self._row_of[layer]] += offset_E1.diff()

    def take(self) -> Tensor:
        """int32 [L, E], and start again from zero."""
        taken_LE = self._count_LE.clone()
        self._taken_LE += taken_LE
        self._count_LE.zero_()
        return taken_LE

    def take_step(self) -> Tensor:
        """int32 [L, E]: all of a step, at its end, whoever has taken parts of it before."""
        self.take()
        step_LE = self._taken_LE.clone()
        self._taken_LE.zero_()
        return step_LE


class NodeLoads:
    """The loads of all nodes, under way: every rank adds what its own node has."""

    def __init__(self, count_LE: Tensor, node: int, num_nodes: int, group: ProcessGroup | None) -> None:
        """Start to sum over the pool's ``group``; None for a pool of one rank. Collective."""
        self._count_LNE = count_LE.new_zeros(count_LE.shape[0], num_nodes, count_LE.shape[1])
        self._count_LNE[:, node] = count_LE
        self._work = None
        if group is not None and group.size() > 1:
            self._work = dist.all_reduce(self._count_LNE, group=group, async_op=True)

    def wait(self) -> Tensor:
        """int32 [L, N, E] on the host."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return self._count_LNE.cpu()
