"""The schedule of a step: in which order its rounds run forward and backward, and when gradients are reduced."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from moetrain.config import RunConfig
from moetrain.mesh.groups import MeshGroups
from moetrain.mesh.traffic import TrafficCounter
from moetrain.models.fsdp import set_gradient_sync
from moetrain.models.transformer import ModelOutput
from moetrain.ops import key_of
from moetrain.placement.store import ExpertStore
from moetrain.sequence.batch import GangShare, PackedBatch
from moetrain.sequence.offload import Offload
from moetrain.sequence.plan import SequencePlan
from moetrain.sequence.ring import GroupRing, Ring
from moetrain.train.placing import Placing


@dataclass(slots=True, eq=False)
class StepSums:
    """What one rank's rounds of a step sum to.

    Args:
        ce_sum: float64 scalar, cross-entropy over loss tokens.
        aux: float64 scalar, auxiliary losses, already divided by the step's tokens.
        num_loss_tokens: tokens with a target that the rank has seen.
    """

    ce_sum: Tensor
    aux: Tensor
    num_loss_tokens: int = 0

    @staticmethod
    def zero(device: torch.device) -> "StepSums":
        """Before the first round."""
        ce_sum, aux = torch.zeros(2, dtype=torch.float64, device=device).unbind()
        return StepSums(ce_sum, aux)

    def add(self, output: ModelOutput, batch: PackedBatch) -> None:
        """Count one round."""
        self.num_loss_tokens += batch.num_loss_tokens
        self.ce_sum.add_(output.ce_sum.detach())
        self.aux.add_(output.aux.detach())


@dataclass(frozen=True, slots=True, eq=False)
class Lane:
    """This rank's place in plans: its rank there, and the ring of each gang that it is in."""

    rank: int
    ring_of: Callable[[GangShare], Ring]

    def ring(self, batch: PackedBatch) -> Ring | None:
        """The ring of a batch's gang; None where it has none."""
        return None if batch.gang is None else self.ring_of(batch.gang)

    @staticmethod
    def of(groups: MeshGroups, traffic: TrafficCounter) -> "Lane":
        """The lane of a rank of ``groups``; what its rings send is counted as ``"ring"``."""
        return Lane(
            groups.group_rank("data"), lambda gang: GroupRing(groups.group("ring"), gang.ranks, counter=traffic)
        )


class Schedule(Protocol):
    """Runs a step's rounds. The ``Engine`` does what comes before (plan, zero gradients) and after (update)."""

    def run(self, plan: SequencePlan, batches: Iterable[PackedBatch], step: int) -> StepSums:
        """Forward and backward of every round. Collective.

        Afterwards dense parameters have their gradients, reduced over the ranks that FSDP knows of, and the expert
        store this rank's.

        Args:
            plan: of the step.
            batches: this rank's micro-batch of every round, possibly without tokens.
            step: optimizer steps done before; random numbers derive from it and the round.

        Raises:
            ValueError: there are not as many micro-batches as rounds.
        """


class RoundByRound:
    """Forward, then backward, of one round after another (gradient accumulation); the last one reduces gradients."""

    def __init__(
        self,
        model: nn.Module,
        run: RunConfig,
        device: torch.device,
        store: ExpertStore,
        placing: Placing,
        lane: Lane,
        offload: Offload | None = None,
    ) -> None:
        """Prepare.

        Args:
            model: the run's, on ``device``.
            run: the configuration.
            device: of the model.
            store: its experts.
            placing: told after each forward pass, so that it plans beside the backward pass.
            lane: of this rank.
            offload: of activations to the host; None where none is asked for.
        """
        self._model = model
        self._run = run
        self._device = device
        self._store = store
        self._placing = placing
        self.lane = lane
        self._offload = offload

    def run(self, plan: SequencePlan, batches: Iterable[PackedBatch], step: int) -> StepSums:
        """See ``Schedule``."""
        shares = plan.offload_of(self.lane.rank) if self._offload is not None else []
        sums, num_batches, num_rounds = StepSums.zero(self._device), 0, plan.num_rounds(self.lane.rank)
        for round_idx, batch in enumerate(batches):
            if round_idx >= num_rounds:
                check_rounds(num_rounds, round_idx + 1)
            is_last = round_idx == num_rounds - 1
            set_gradient_sync(self._model, is_last, self._run.train.reshard_after_forward)
            self._store.reduces = self._placing.reduces(is_last=is_last)
            if round_idx > 0:
                self._placing.between_rounds(step)
            key = random_key(self._run, step, round_idx)
            waits = self._offload.share(shares[round_idx]) if self._offload is not None else nullcontext()
            with waits:
                output = run_forward(self._model, batch.to(self._device), plan, key, self.lane)
            self._placing.forward_done(step, is_last=is_last)
            loss_of(output, plan).backward()
            sums.add(output, batch)
            num_batches += 1
        check_rounds(num_rounds, num_batches)
        return sums


def random_key(run: RunConfig, step: int, round_idx: int) -> int:
    """What is random in a round derives from this."""
    return key_of(run.seed, "micro_batch", step, round_idx)


def run_forward(
    model: nn.Module, batch: PackedBatch, plan: SequencePlan, key: int, lane: Lane | None = None
) -> ModelOutput:
    """One round's summed losses; ``lane`` is this rank's, where a batch may have a gang."""
    ring = None if lane is None else lane.ring(batch)
    output: ModelOutput = model(batch, num_step_tokens=plan.num_tokens, random_key=key, ring=ring)
    return output


def loss_of(output: ModelOutput, plan: SequencePlan) -> Tensor:
    """One round's share of the step's loss: sums over the global count, however tokens fell into ranks and rounds."""
    return output.ce_sum / max(1, plan.num_loss_tokens) + output.aux


def check_rounds(num_rounds: int, num_batches: int) -> None:
    """Refuse a number of micro-batches that is not the plan's.

    Raises:
        ValueError: always then.
    """
    if num_batches != num_rounds:
        raise ValueError(
            f"Engine.step: the plan has {num_rounds} rounds but {num_batches} micro-batches came; give one per round, "
            "one without tokens where a rank has nothing to do"
        )
