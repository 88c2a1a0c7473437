"""One optimizer step under any mesh: the part that training and `moetrain verify` share.

Shapes: E experts, D width, F expert hidden width, L layers, T tokens of one micro-batch.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetrain.config import RunConfig
from moetrain.config.errors import require
from moetrain.mesh.collectives import all_reduce_sum
from moetrain.mesh.groups import MeshGroups
from moetrain.models import names
from moetrain.models.build import build_model, compute_dtype
from moetrain.models.fsdp import set_gradient_sync
from moetrain.ops import key_of
from moetrain.placement.chunks import ExpertShape
from moetrain.sequence.batch import PackedBatch
from moetrain.sequence.plan import SequencePlan
from moetrain.train.grad_norm import StepTotals, clip_factor, sum_over_tp, total_over_ranks
from moetrain.train.learning_rate import learning_rate
from moetrain.train.optimizer import make_optimizer, set_learning_rate
from moetrain.train.shards import Shard, dense_shards, expert_shards, zeros_if_none
from moetrain.train.traffic import count_dense_gradients


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
    # An evaluation in between is told apart: the weights that it gathered are "evaluation_gather", and not sent again.
    bytes_sent: dict[str, int]
    bytes_between_nodes: dict[str, int]  # those of them that go to another node; without dense gradients
    bytes_sent_by_all: int  # the sum of the former over purposes and ranks
    bytes_between_nodes_by_all: int


class Engine:
    """Model, expert store, balancing state and optimizer of one rank; ``step`` is collective over all ranks."""

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
        self.placements = built.placements
        self.traffic = built.traffic
        self.compute_dtype = compute_dtype(run, self.device)
        self.dense = tuple(dense_shards(self.model, built.model.cuts()))
        self.experts = tuple(expert_shards(self.store))
        self.optimizer = make_optimizer(self.shards, run.optim)
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
            batches: this rank's micro-batch of every round, possibly with zero rows.

        Raises:
            NonFiniteGradientError: ``max_skipped_steps`` steps in a row had a gradient norm that was not finite.
            ValueError: on every rank, before anything is computed, if a micro-batch has more rows than
                ``data.micro_batch`` and dispatch is padded to what these need.
        """
        self._check_fits(plan)
        self.model.train()
        self.zero_grad()
        ce_sum, aux = self._accumulate(plan, batches)
        self.store.reduce_gradients()
        with torch.no_grad():
            for shard in self.shards:
                shard.fetch_gradient()
            self.share_gradients()
        count_dense_gradients(self.traffic, self.dense, self.groups, self.compute_dtype)
        totals = total_over_ranks(self.shards, ce_sum, aux, self.traffic, self.groups)
        lr = learning_rate(self.num_steps_done, self.run.optim, self.run.train.steps)
        skipped = not self._update(totals, lr)
        all_reduce = partial(all_reduce_sum, group=self.groups.group("pool"))
        balance = self.balance.finish_step(all_reduce, skipped=skipped)
        self.num_steps_done += 1
        max_vio = tuple(float(value) for value in balance.max_vio)
        report = StepReport(
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
        )
        self.traffic.reset()
        return report

    def _check_fits(self, plan: SequencePlan) -> None:
        most = max((len(item.sequence_ids) for item in plan.items), default=0)
        require(
            not self.run.dispatch.pad_to_capacity or most <= self.run.data.micro_batch,
            f"Engine.step: dispatch.pad_to_capacity sizes messages for micro-batches of data.micro_batch = "
            f"{self.run.data.micro_batch} rows, but the plan has one of {most}; raise data.micro_batch",
        )

    def _accumulate(self, plan: SequencePlan, batches: Iterable[PackedBatch]) -> tuple[Tensor, Tensor]:
        """Forward and backward of all rounds; returns this rank's sums of cross-entropy and auxiliary loss."""
        ce_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        aux = torch.zeros((), dtype=torch.float64, device=self.device)
        num_rounds = 0
        for round_idx, batch in enumerate(batches):
            set_gradient_sync(self.model, round_idx == plan.num_rounds - 1, self.run.train.reshard_after_forward)
            key = key_of(self.run.seed, "micro_batch", self.num_steps_done, round_idx)
            output = self.model(batch.to(self.device), num_step_tokens=plan.num_tokens, random_key=key)
            # Summed losses over the global count: how tokens fell into ranks and rounds cannot matter.
            (output.ce_sum / max(1, plan.num_loss_tokens) + output.aux).backward()
            ce_sum += output.ce_sum.detach()
            aux += output.aux.detach()
            num_rounds += 1
        if num_rounds != plan.num_rounds:
            raise ValueError(
                f"Engine.step: the plan has {plan.num_rounds} rounds but {num_rounds} micro-batches came; "
                "give one per round, with zero rows where a rank has nothing to do"
            )
        return ce_sum, aux

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

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter whole, on every rank, under its logical name. Collective.

        Experts are stacked: ``layers.{l}.moe.experts.w_in`` [E, 2 or 1, F, D] and ``.w_out`` [E, D, F].
        """
        full = {shard.name: self._full(shard, shard.local()) for shard in self.dense}
        for shard in self.experts:
            full.update(self._stacked(shard, shard.value.detach()))
        return full

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the last step as the optimizer saw them (clipped), like ``parameters``. Collective."""
        full = {
            shard.name: self._full(shard, zeros_if_none(shard.value.grad, shard.value.detach())) for shard in self.dense
        }
        for shard in self.experts:
            full.update(self._stacked(shard, zeros_if_none(shard.value.grad, shard.value.detach())))
        return full

    def _full(self, shard: Shard, local: Tensor) -> Tensor:
        """The whole of a dense tensor, each element from the lowest rank that has it. Collective."""
        group, rank = self.groups.group("pool"), self.groups.group_rank("pool")
        region = shard.region(local)
        source = torch.full(shard.shape, self.groups.size("pool"), dtype=torch.int32, device=local.device)
        source[region] = rank
        dist.all_reduce(source, op=dist.ReduceOp.MIN, group=group)
        full = local.new_zeros(shard.shape)
        full[region] = torch.where(source[region] == rank, local, 0)
        return all_reduce_sum(full, group)

    def _stacked(self, shard: Shard, owned: Tensor) -> dict[str, Tensor]:
        """Experts of one layer, from what each rank owns, as two stacked tensors on every rank."""
        layer = shard.expert_layer
        assert layer is not None
        flat = self.store.full_expert(layer, {layer: owned})
        shape = self.expert_shape
        split = math.prod(shape.w_in_shape)
        flat_EP = torch.stack([flat[expert] for expert in range(self.run.moe.num_experts)])
        return {
            names.stacked(layer, "w_in"): flat_EP[:, :split].reshape(-1, *shape.w_in_shape),
            names.stacked(layer, "w_out"): flat_EP[:, split:].reshape(-1, *shape.w_out_shape),
        }

    @torch.no_grad()
    def load_parameters(self, full: Mapping[str, Tensor]) -> None:
        """Take every parameter from whole tensors named as in ``parameters``; the optimizer's state stays.

        Raises:
            ValueError: a name is missing or unknown, or a shape differs.
        """
        self._check_names(full)
        for shard in self.dense:
            local = shard.local()
            local.copy_(full[shard.name][shard.region(local)])
        flats = {
            shard.expert_layer: torch.cat(
                [full[f"{shard.name}.w_in"].flatten(1), full[f"{shard.name}.w_out"].flatten(1)], dim=1
            )
            for shard in self.experts
        }
        self.store.initialise(lambda layer, expert, index_N: flats[layer][expert, index_N.to(self.device)])
        self.store.advance_epoch()

    def _check_names(self, full: Mapping[str, Tensor]) -> None:
        num_experts, shape = self.run.moe.num_experts, self.expert_shape
        wanted = {shard.name: shard.shape for shard in self.dense}
        for shard in self.experts:
            wanted[f"{shard.name}.w_in"] = (num_experts, *shape.w_in_shape)
            wanted[f"{shard.name}.w_out"] = (num_experts, *shape.w_out_shape)
        if wrong := sorted(wanted.keys() ^ full.keys()):
            raise ValueError(
                f"load_parameters: names must be the model's, but {', '.join(wrong[:4])} are missing or unknown; "
                "give every parameter of Engine.parameters() and no other"
            )
        for name, dims in wanted.items():
            if tuple(full[name].shape) != tuple(dims):
                raise ValueError(f"load_parameters: {name} must be {list(dims)}, got {list(full[name].shape)}")
