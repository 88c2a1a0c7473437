"""The schedule of a step: in which order its rounds run forward and backward, and when gradients are reduced."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from moetrain.config import RunConfig
from moetrain.models.fsdp import set_gradient_sync
from moetrain.models.transformer import ModelOutput
from moetrain.ops import key_of
from moetrain.placement.store import ExpertStore
from moetrain.sequence.batch import PackedBatch
from moetrain.sequence.plan import SequencePlan
from moetrain.train.placing import Placing


@dataclass(frozen=True, slots=True, eq=False)
class StepSums:
    """What one rank's rounds of a step sum to: float64 scalars.

    Args:
        ce_sum: cross-entropy over loss tokens.
        aux: auxiliary losses, already divided by the step's tokens.
    """

    ce_sum: Tensor
    aux: Tensor

    @staticmethod
    def zero(device: torch.device) -> "StepSums":
        """Before the first round."""
        return StepSums(*(torch.zeros((), dtype=torch.float64, device=device) for _ in range(2)))

    def add(self, output: ModelOutput) -> None:
        """Count one round."""
        self.ce_sum.add_(output.ce_sum.detach())
        self.aux.add_(output.aux.detach())


class Schedule(Protocol):
    """Runs a step's rounds. The ``Engine`` does what comes before (plan, zero gradients) and after (update)."""

    def run(self, plan: SequencePlan, batches: Iterable[PackedBatch], step: int) -> StepSums:
        """Forward and backward of every round. Collective.

        Afterwards dense parameters have their gradients, reduced over the ranks that FSDP knows of, and the expert
        store this rank's.

        Args:
            plan: of the step.
            batches: this rank's micro-batch of every round, possibly with zero rows.
            step: optimizer steps done before; random numbers derive from it and the round.

        Raises:
            ValueError: there are not as many micro-batches as rounds.
        """


class RoundByRound:
    """Forward, then backward, of one round after another (gradient accumulation); the last one reduces gradients."""

    def __init__(
        self, model: nn.Module, run: RunConfig, device: torch.device, store: ExpertStore, placing: Placing
    ) -> None:
        """Prepare.

        Args:
            model: the run's, on ``device``.
            run: the configuration.
            device: of the model.
            store: its experts.
            placing: told after each forward pass, so that it plans beside the backward pass.
        """
        self._model = model
        self._run = run
        self._device = device
        self._store = store
        self._placing = placing

    def run(self, plan: SequencePlan, batches: Iterable[PackedBatch], step: int) -> StepSums:
        """See ``Schedule``."""
        sums, num_rounds = StepSums.zero(self._device), 0
        for round_idx, batch in enumerate(batches):
            if round_idx >= plan.num_rounds:
                check_rounds(plan, round_idx + 1)
            is_last = round_idx == plan.num_rounds - 1
            set_gradient_sync(self._model, is_last, self._run.train.reshard_after_forward)
            self._store.reduces = self._placing.reduces(is_last=is_last)
            if round_idx > 0:
                self._placing.between_rounds(step)
            output = run_forward(self._model, batch.to(self._device), plan, random_key(self._run, step, round_idx))
            self._placing.forward_done(step, is_last=is_last)
            loss_of(output, plan).backward()
            sums.add(output)
            num_rounds += 1
        check_rounds(plan, num_rounds)
        return sums


def random_key(run: RunConfig, step: int, round_idx: int) -> int:
    """What is random in a round derives from this."""
    return key_of(run.seed, "micro_batch", step, round_idx)


def run_forward(model: nn.Module, batch: PackedBatch, plan: SequencePlan, key: int) -> ModelOutput:
    """One round's summed losses."""
    output: ModelOutput = model(batch, num_step_tokens=plan.num_tokens, random_key=key)
    return output


def loss_of(output: ModelOutput, plan: SequencePlan) -> Tensor:
    """One round's share of the step's loss: sums over the global count, however tokens fell into ranks and rounds."""
    return output.ce_sum / max(1, plan.num_loss_tokens) + output.aux


def check_rounds(plan: SequencePlan, num_rounds: int) -> None:
    """Refuse a number of micro-batches that is not the plan's.

    Raises:
        ValueError: always then.
    """
    if num_rounds != plan.num_rounds:
        raise ValueError(
            f"Engine.step: the plan has {plan.num_rounds} rounds but {num_rounds} micro-batches came; "
            "give one per round, with zero rows where a rank has nothing to do"
        )
