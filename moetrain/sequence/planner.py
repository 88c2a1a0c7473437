"""Makes the plan of each step of a run."""

from dataclasses import dataclass, replace
from math import lcm

import numpy as np
import torch

from moetrain.config import RunConfig
from moetrain.cost.sequence_costs import UNMEASURED_SEQUENCES, SequenceCosts
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.ops import plan_sequences
from moetrain.sequence.data_planner import plan_data
from moetrain.sequence.plan import Ints, SequencePlan


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlanner:
    """What a plan follows from besides the step's sequences: equal on all ranks.

    Args:
        planner: ``data``, ``context``, ``bytescale`` or ``moetrain``.
        num_ranks: lanes, the ranks of the data group.
        block: neighbouring lanes that share all-to-alls.
        equal_rounds: all ranks must run the same number of rounds, since parameters are gathered in each.
        gang: ranks of every gang, of ``context``.
        micro_batch: sequences of a gang and round, where rounds are filled by rows; None where they are by tokens.
        capacity: tokens whose activations a rank can hold in one round.
        most_tokens: of a rank and round, where that is more than its capacity, since some wait on the host.
        offload: share of each item's activations that does.
        num_layers: layers that have activations.
        costs: what sequences are estimated to take.
    """

    planner: str
    num_ranks: int
    block: int
    equal_rounds: bool
    gang: int
    micro_batch: int | None
    capacity: int
    most_tokens: int | None = None
    offload: float = 0.0
    num_layers: int = 0
    costs: SequenceCosts = UNMEASURED_SEQUENCES

    @classmethod
    def of(cls, run: RunConfig, mesh: FoldedMesh, costs: SequenceCosts = UNMEASURED_SEQUENCES) -> "StepPlanner":
        """The planner of a run on a mesh."""
        return cls(
            planner=run.sequence.planner,
            num_ranks=mesh.size("data"),
            block=lanes_of_block(mesh),
            equal_rounds=run.train.reshard_after_forward,
            gang=mesh.cp,
            micro_batch=None if run.plans_tokens else run.data.micro_batch,
            capacity=run.capacity,
            most_tokens=run.most_tokens,
            offload=run.sequence.offload,
            num_layers=run.model.num_layers,
            costs=costs,
        )

    def for_evaluation(self) -> "StepPlanner":
        """The same, for passes without gradients: parameters are always gathered anew, and nothing is saved."""
        return replace(self, equal_rounds=True)

    def plan(self, table_N3: Ints) -> SequencePlan:
        """Plan a step.

        Args:
            table_N3: id, tokens and loss tokens of its sequences.

        Raises:
            ValueError: a sequence is longer than all ranks together hold.
        """
        if self.micro_batch is not None:
            plan = plan_data(table_N3, self.num_ranks, self.micro_batch, gang=self.gang, block=self.block)
            offload_I = np.full(plan.num_items, self.offload)
            return replace(plan, offload_I=offload_I, num_layers=self.num_layers) if self.offload else plan
        found = plan_sequences(
            torch.from_numpy(np.ascontiguousarray(table_N3[:, 1])),
            planner=self.planner,
            num_ranks=self.num_ranks,
            block=self.block,
            capacity=self.most_tokens or self.capacity,
            gang=self.gang,
            equal_rounds=self.equal_rounds,
            costs=self.costs,
        )
        return SequencePlan(
            sequence_N3=np.ascontiguousarray(table_N3),
            round_I=found.round_I.numpy(),
            offset_I1=found.offset_I1.numpy(),
            member_N=found.member_N.numpy(),
            rank_offset_I1=found.rank_offset_I1.numpy(),
            rank_M=found.rank_M.numpy(),
            offload_I=np.full(len(found.round_I), self.offload),
            est_ms_I=found.est_ms_I.numpy(),
            rounds_R=found.rounds_R.numpy(),
            block=self.block,
            capacity=self.capacity,
            num_layers=self.num_layers if self.offload else 0,
            lower_bound_ms=found.lower_bound_ms,
            est_makespan_ms=found.est_makespan_ms,
        )


def lanes_of_block(mesh: FoldedMesh) -> int:
    """Neighbouring lanes (tp groups) that dispatch joins, directly or by way of one another.

    Of ranks in a row, each tp in number are a lane, and each ep * etp a dispatch group.

    >>> lanes_of_block(FoldedMesh(dp_shard=4, ep=4)), lanes_of_block(FoldedMesh(dp_shard=3, tp=2, ep=3, edp=2))
    (4, 3)
    """
    return lcm(mesh.size("dispatch"), mesh.tp) // mesh.tp
