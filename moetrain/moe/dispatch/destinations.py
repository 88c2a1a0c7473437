"""Where experts are reached: the rank of each, and the groups of ranks among which rows move.

Shapes: E experts, e experts held here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from moetrain.config import NotBuiltYetError
from moetrain.mesh.groups import MeshGroups
from moetrain.moe.routing import Routing
from moetrain.ops import plan_sends
from moetrain.placement.placement import Placement


@dataclass(frozen=True, slots=True, eq=False)
class Destinations:
    """Where each of some experts is reached, among the ranks of a group (or the nodes of several).

    Args:
        rank_E: int32, index in the group of the rank to which this rank sends expert e's tokens.
        local_E: int32, index of e among the experts held by that rank.
        max_local: most experts that any rank of the group holds.
        num_local: experts held here.
    """

    rank_E: Tensor
    local_E: Tensor
    max_local: int
    num_local: int

    @staticmethod
    def of(
        ranks_E: Sequence[int], held: Sequence[Sequence[int]], group_rank: int, device: torch.device
    ) -> "Destinations":
        """From the destination of each expert and the experts each rank of the group holds, ascending."""
        index_at = [{expert: index for index, expert in enumerate(experts)} for experts in held]
        local_E = [index_at[rank][e] for e, rank in enumerate(ranks_E)]
        return Destinations(
            rank_E=torch.tensor(ranks_E, dtype=torch.int32, device=device),
            local_E=torch.tensor(local_E, dtype=torch.int32, device=device),
            max_local=max(map(len, held)),
            num_local=len(held[group_rank]),
        )

    def sends(self, routing: Routing, bad_1: Tensor, num_ranks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``plan_sends`` of a routing over these experts."""
        return plan_sends(
            routing.token_N,
            routing.offset_E1,
            self.rank_E,
            self.local_E,
            bad_1,
            num_tokens=routing.num_tokens,
            num_ranks=num_ranks,
            max_local=self.max_local,
        )


@dataclass(frozen=True, slots=True, eq=False)
class DispatchGroups:
    """The ranks among which rows move.

    Args:
        ep: rows travel to the rank of this group that has the expert.
        parts: the etp group, whose ranks have parts of the same experts and share the rows that reach one of them;
            None where experts are whole.
        counts: both, etp innermost; the same as ``ep`` where experts are whole.
        between: for two levels, the ranks of ``ep`` in this rank's place on every node; None for one level.
        inside: for two levels, the ranks of ``ep`` on this rank's node. Nodes are outermost in ``ep``.
    """

    ep: ProcessGroup
    parts: ProcessGroup | None
    counts: ProcessGroup
    between: ProcessGroup | None = None
    inside: ProcessGroup | None = None

    @staticmethod
    def of(groups: MeshGroups) -> "DispatchGroups":
        """Those of a mesh; two levels where the mesh asks for them and they differ from one."""
        two = groups.mesh.two_level and groups.size("ep_between") > 1 and groups.size("ep_inside") > 1
        return DispatchGroups(
            ep=groups.group("ep"),
            parts=groups.group("etp") if groups.size("etp") > 1 else None,
            counts=groups.group("dispatch"),
            between=groups.group("ep_between") if two else None,
            inside=groups.group("ep_inside") if two else None,
        )

    @property
    def num_parts(self) -> int:
        """Ranks of ``parts``."""
        return 1 if self.parts is None else self.parts.size()

    @property
    def part(self) -> int:
        """This rank's index in ``parts``."""
        return 0 if self.parts is None else self.parts.rank()


def destinations_in(placement: Placement, pool_ranks: Sequence[int], here: int) -> list[int]:
    """Index in the group of the rank to which pool rank ``here`` sends each expert's tokens.

    Raises:
        NotBuiltYetError: if an expert is reached outside the group.
    """
    index_of = {rank: index for index, rank in enumerate(pool_ranks)}
    reached = [placement.destination(here, expert) for expert in range(placement.num_experts)]
    outside = sorted(set(reached) - set(pool_ranks))
    if outside:
        raise NotBuiltYetError(
            "placement.quotas", outside, f"send tokens of pool rank {here} to pool ranks {list(pool_ranks)} only"
        )
    return [index_of[rank] for rank in reached]
