"""One optimizer step under any mesh: the part that training and `moetrain verify` share.

Shapes: E experts, D width, F expert hidden width, L layers, T tokens of one micro-batch.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from moetrain.config import RunConfig
from moetrain.config.errors import require
from moetrain.cost.sequence_costs import UNMEASURED_SEQUENCES
from moetrain.cost.step_costs import UNMEASURED
from moetrain.mesh.collectives import all_reduce_sum
from moetrain.mesh.groups import MeshGroups
from moetrain.models.build import build_model, compute_dtype, most_held, most_owned
from moetrain.moe.balance.state import BalanceReport
from moetrain.moe.layer import MoELayer
from moetrain.placement.chunks import ExpertShape
from moetrain.placement.placement import Placement
from moetrain.sequence.batch import PackedBatch
from moetrain.sequence.host_copies import host_copies
from moetrain.sequence.offload import Offload, OffloadCounts
from moetrain.sequence.plan import SequencePlan
from moetrain.train.grad_norm import StepTotals, Told, clip_factor, sum_over_tp, total_over_ranks
from moetrain.train.learning_rate import learning_rate
from moetrain.train.memory import layers_that_fit
from moetrain.train.optimizer import make_optimizer, moments, num_updates, replace_moments, set_learning_rate
from moetrain.train.placing import Placing, Plan
from moetrain.train.schedule import Lane, RoundByRound, Schedule, StepSums
from moetrain.train.shards import Shard, dense_shards, expert_shards
from moetrain.train.traffic import count_dense_gradients
from moetrain.train.whole_tensors import WholeTensors


class NonFiniteGradientError(RuntimeError):
    """The gradient norm was not finite in too many steps in a row."""


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step did, over all ranks and equal on every rank, but for the bytes, which are this rank's."""

    loss: float  # mean cross-entropy, nats per loss token
    ce_sum: float
    aux: float  # auxiliary losses as added to the mean cross-entropy, summed over layers
    grad_norm: float  # before clipping
    lr: float
    num_tokens: int
    num_loss_tokens: int
    max_vio: float  # of the worst layer: max load / mean load - 1
    max_vio_per_layer: tuple[float, ...]
    skipped: bool  # the gradient was not finite: no parameter, moment or balancing state changed
    rows_added: int  # by token rounding, in all layers
    rows_dropped: int  # by token rounding or capacity
    # By this rank to others since the report of the step before, by purpose (see TrafficCounter); not over all ranks.
    # An evaluation in between is told apart: weights that it gathered are "evaluation_gather", and those that are kept
    # are not sent again.
    bytes_sent: dict[str, int]
    bytes_between_nodes: dict[str, int]  # those of them that go to another node; without dense gradients
    bytes_sent_by_all: int  # the sum of the former over purposes and ranks
    bytes_between_nodes_by_all: int
    bytes_offloaded: int  # of this rank's activations, to the host
    offload_seconds: float  # that this rank waited for what was not back in time, as its host sees it


class Engine:
    """Model, expert store, balancing state and optimizer of one rank; ``step`` is collective over all ranks.

    ``schedule`` says in which order a step's rounds run, and another one may be put in its place; ``whole`` gathers and
    fills whole tensors.
    """

    def __init__(
        self, run: RunConfig, groups: MeshGroups, device: torch.device | str, *, max_skipped_steps: int = 10
    ) -> None:
        """Build everything ``run`` describes.

        Args:
            run: the configuration.
            groups: this rank's process groups.
            device: where parameters live.
            max_skipped_steps: so many consecutive steps with a non-finite gradient end the run.

        Raises:
            ValueError: the mesh fits neither the ranks nor the model; see ``RunConfig.validate_for``.
        """
        run.validate_for(groups.size("world"))
        self.run = run
        self.groups = groups
        self.device = torch.device(device)
        built = build_model(run, groups, self.device)
        self.model: nn.Module = built.model
        self.store = built.store
        self.balance = built.balance
        self.traffic = built.traffic
        self.loads = built.loads
        self.compute_dtype = compute_dtype(run, self.device)
        self.dense = tuple(dense_shards(self.model, built.model.cuts()))
        self.experts = tuple(expert_shards(self.store))
        self.whole = WholeTensors(self.dense, self.experts, self.store, groups)
        self.placing = Placing(
            run.placement,
            built.placed,
            built.loads,
            groups,
            UNMEASURED,
            seed=run.seed,
            most_owned=most_owned(run, groups.mesh),
        )
        self.sequence_costs = UNMEASURED_SEQUENCES  # that steps and evaluations are planned by
        self.lane = Lane.of(groups, self.traffic)
        self.offload: Offload | None = None
        if run.sequence.offload > 0:
            copies = host_copies(self.device)
            self.offload = Offload(self.model, list(built.model.layers), copies, self.store.is_weight)
        self.schedule: Schedule = RoundByRound(
            self.model, run, self.device, self.store, self.placing, self.lane, self.offload
        )
        self.optimizer = make_optimizer(self.shards, run.optim, keep_empty=run.placement.moves)
        self._keep_weights()
        for module in self.model.modules() if run.placement.calibrate else ():
            if isinstance(module, MoELayer):
                module.calibrate = self.placing.calibrate
        self.max_skipped_steps = max_skipped_steps
        self.num_steps_done = 0
        self.num_skipped_in_a_row = 0
        self.num_skipped = 0

    @property
    def shards(self) -> tuple[Shard, ...]:
        """All shards of this rank: dense ones in the model's order, then experts by layer."""
        return self.dense + self.experts

    @property
    def expert_shape(self) -> ExpertShape:
        """Shape of one expert."""
        moe = self.run.moe
        return ExpertShape(width=self.run.model.width, hidden=moe.expert_width, gated=moe.gated)

    def num_parameters(self) -> int:
        """Parameters of the whole model, experts included."""
        dense = sum(math.prod(shard.shape) for shard in self.dense)
        per_layer = self.run.moe.num_experts * self.expert_shape.num_parameters
        return dense + per_layer * len(self.experts)

    def step(self, plan: SequencePlan, batches: Iterable[PackedBatch]) -> StepReport:
        """Forward, backward and update for one global batch. Collective.

        Args:
            plan: the step's plan; it says the rounds and the global token counts.
            batches: this rank's micro-batch of every round, possibly without tokens.

        Raises:
            RuntimeError: on every rank, before anything is updated, if ranks saw another number of loss tokens than the
                plan has.
            NonFiniteGradientError: ``max_skipped_steps`` steps in a row had a gradient norm that was not finite.
            ValueError: on every rank, before anything is computed, if a micro-batch may have more tokens than the run's
                capacity, and dispatch is padded to what that needs.
        """
        self._check_fits(plan)
        self.model.train()
        self.placing.begin_step()
        self.zero_grad()
        sums = self.schedule.run(plan, batches, self.num_steps_done)
        self.store.reduce_gradients()
        with torch.no_grad():
            for shard in self.shards:
                shard.fetch_gradient()
            self.share_gradients()
        count_dense_gradients(self.traffic, self.dense, self.groups, self.compute_dtype)
        planned = self.placing.planned()
        totals = total_over_ranks(self._told(sums, planned), self.dense, self.store, self.groups)
        self._check_seen(plan, totals)
        if planned is not None:
            self.placing.compare(planned, self.num_steps_done, totals.digests, "world")
        lr = learning_rate(self.num_steps_done, self.run.optim, self.run.train.steps)
        skipped = not self._update(totals, lr)
        if planned is not None and skipped and planned.moves:  # a skipped step moves no owner
            planned = self.placing.plan_again()
        if planned is not None:
            self.take(planned)
        all_reduce = partial(all_reduce_sum, group=self.groups.group("pool"))
        balance = self.balance.finish_step(all_reduce, skipped=skipped)
        self.num_steps_done += 1
        report = self._report(plan, totals, balance, lr, skipped=skipped)
        self.traffic.reset()
        return report

    def _report(
        self, plan: SequencePlan, totals: StepTotals, balance: BalanceReport, lr: float, *, skipped: bool
    ) -> StepReport:
        offloaded = OffloadCounts() if self.offload is None else self.offload.taken_counts()
        max_vio = tuple(float(value) for value in balance.max_vio)
        return StepReport(
            loss=totals.ce_sum / max(1, plan.num_loss_tokens),
            ce_sum=totals.ce_sum,
            aux=totals.aux,
            grad_norm=totals.grad_norm,
            lr=lr,
            num_tokens=plan.num_tokens,
            num_loss_tokens=plan.num_loss_tokens,
            max_vio=max(max_vio, default=0.0),
            max_vio_per_layer=max_vio,
            skipped=skipped,
            rows_added=sum(balance.rows_added),
            rows_dropped=sum(balance.rows_dropped),
            bytes_sent=dict(self.traffic.bytes),
            bytes_between_nodes=dict(self.traffic.between_nodes),
            bytes_sent_by_all=totals.bytes_sent,
            bytes_between_nodes_by_all=totals.bytes_between_nodes,
            bytes_offloaded=offloaded.num_bytes,
            offload_seconds=offloaded.waited_s,
        )

    def _told(self, sums: StepSums, plan: Plan | None) -> Told:
        """What this rank tells the others at the end of a step."""
        sent, between = (sum(counts.values()) for counts in (self.traffic.bytes, self.traffic.between_nodes))
        digest = 0 if plan is None else plan.digest()
        return Told(sums.ce_sum, sums.aux, sums.num_loss_tokens, sent, between, digest)

    def take(self, plan: Plan) -> None:
        """Use a plan from now on: owners move, with their moments, then holders change. Collective over the pool."""
        self.move_owners({layer: plan.placements[layer] for layer in plan.moves})
        self.placing.take(plan)

    def move_owners(self, placements: Mapping[int, Placement]) -> None:
        """Give the experts of some layers the owners of these placements, which become current. Collective.

        Masters and moments move as they are; how many updates there were is the same everywhere.
        """
        shards = {shard.expert_layer: shard for shard in self.experts}
        beside = {layer: list(moments(self.optimizer, shards[layer]).values()) for layer in placements}
        num_done = num_updates(self.optimizer)
        moved = self.store.move_owners(placements, beside)
        for layer, tensors in moved.items():
            replace_moments(self.optimizer, shards[layer], tensors, num_done)

    def _keep_weights(self) -> None:
        """Decide which layers keep their experts' weights between forward and backward pass."""
        choice = self.run.placement.rematerialise
        kept = self.store.layers if choice == "keep" else ()
        if choice == "auto":
            most = most_held(self.run, self.store.placement(self.store.layers[0]))
            kept = layers_that_fit(self.store, most, self.groups)
        self.store.keep_weights(kept)

    def _check_fits(self, plan: SequencePlan) -> None:
        limit = self.run.capacity
        require(
            not self.run.dispatch.pad_to_capacity or plan.capacity <= limit,
            f"Engine.step: dispatch.pad_to_capacity sizes messages for micro-batches of {limit} tokens, but the plan "
            f"may have one of {plan.capacity}; raise "
            f"{'sequence.capacity' if self.run.plans_tokens else 'data.micro_batch'}",
        )

    def _check_seen(self, plan: SequencePlan, totals: StepTotals) -> None:
        if totals.num_loss_tokens != plan.num_loss_tokens:
            raise RuntimeError(
                f"Engine.step: ranks must see the plan's {plan.num_loss_tokens} loss tokens in step "
                f"{self.num_steps_done}, but saw {totals.num_loss_tokens}; nothing was updated. A batch is missing, "
                "came twice, or is not of the data that the plan was made from: documents must end in EOD and hold no "
                "other; prepare the dataset again if it was damaged"
            )

    @torch.no_grad()
    def _update(self, totals: StepTotals, lr: float) -> bool:
        """Clip and step; false, and nothing changed, where the gradient norm is not finite."""
        if not math.isfinite(totals.grad_norm):
            self.num_skipped += 1
            self.num_skipped_in_a_row += 1
            if self.num_skipped_in_a_row >= self.max_skipped_steps:
                raise NonFiniteGradientError(
                    f"rank {self.groups.rank}: the gradient norm was not finite in {self.num_skipped_in_a_row} steps "
                    f"in a row, up to step {self.num_steps_done}; lower optim.lr or look at the data of these steps"
                )
            return False
        self.num_skipped_in_a_row = 0
        factor = clip_factor(totals.grad_norm, self.run.optim.clip_norm)
        if factor < 1.0:
            for shard in self.shards:
                if shard.value.grad is not None:
                    shard.value.grad.mul_(factor)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.store.advance_epoch()
        return True

    def share_gradients(self) -> None:
        """Sum the gradients of dense parameters that every rank of a tp group has. Collective over tp."""
        sum_over_tp(self.dense, self.groups)

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for shard in self.shards:
            shard.clear_gradient()
        self.store.zero_grad()
