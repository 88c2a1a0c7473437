"""One optimizer step in one process: what every mesh, placement and sequence plan must reproduce."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.config import RunConfig
from moetrain.oracle.model import BalanceInputs, MicroBatch, loss_terms
from moetrain.oracle.optimizer import Optimizer, clipped, global_norm
from moetrain.oracle.random import key_of
from moetrain.oracle.routing import moved_bias


@dataclass(frozen=True, slots=True)
class OracleStep:
    """Everything one step can be compared by."""

    loss: float  # ce_sum / num_loss_tokens + aux
    ce_sum: float
    aux: float
    num_tokens: int
    num_loss_tokens: int
    grads: dict[str, Tensor]  # as the optimizer saw them: clipped; as they came where the step was skipped
    grad_norm: float  # before clipping
    params: dict[str, Tensor]  # after the step
    count_E: dict[int, Tensor]  # layer -> int64 choices over all micro-batches
    gap: float  # the narrowest routing decision


class OracleTrainer:
    """Parameters, moments and balancing state of one process that sees all micro-batches of every rank."""

    def __init__(self, params: Mapping[str, Tensor], run: RunConfig) -> None:
        self.run = run
        self.params = {name: value.detach().clone() for name, value in params.items()}
        self.optimizer = Optimizer(run.optim, run.train.steps)
        dtype = self.params["embed.weight"].dtype
        layers = run.model.moe_layers
        self.balance = BalanceInputs(
            lagged_count_E={layer: torch.zeros(run.moe.num_experts, dtype=torch.int64) for layer in layers},
            bias_E={layer: torch.zeros(run.moe.num_experts, dtype=dtype) for layer in layers},
        )

    def step(self, micro_batches: Sequence[MicroBatch]) -> OracleStep:
        """Accumulate over ``micro_batches`` (one per domain and round), clip, update, and move the balancing state.

        Losses are summed and divided once, cross-entropy by the step's loss tokens and the others by its tokens. A
        gradient whose norm is not finite changes nothing; the schedule and the next step's random key go on.
        """
        num_tokens = sum(batch.num_tokens for batch in micro_batches)
        num_loss_tokens = sum(batch.num_loss_tokens for batch in micro_batches)
        leaves = {name: value.clone().requires_grad_() for name, value in self.params.items()}
        count_E = {layer: torch.zeros_like(count) for layer, count in self.balance.lagged_count_E.items()}
        ce_sum, aux, gap = 0.0, 0.0, float("inf")
        for batch in micro_batches:
            if not batch.documents:
                continue
            key = key_of(self.run.seed, "micro_batch", self.optimizer.step_idx, batch.round_idx)
            terms = loss_terms(
                leaves, self.run.model, self.run.layer_config, batch, self.balance, max(1, num_tokens), key
            )
            (terms.ce_sum / max(1, num_loss_tokens) + terms.aux).backward()
            ce_sum, aux = ce_sum + terms.ce_sum.item(), aux + terms.aux.item()
            gap = min(gap, terms.gap)
            count_E = {layer: count + terms.count_E[layer] for layer, count in count_E.items()}
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in leaves.items()}
        norm = global_norm(grads)
        if math.isfinite(norm):
            grads = clipped(grads, self.run.optim.clip_norm)
            self.params = self.optimizer.step(self.params, grads)
            self._move_balance(count_E)
        else:
            self.optimizer.skip()
        loss = ce_sum / max(1, num_loss_tokens) + aux
        return OracleStep(loss, ce_sum, aux, num_tokens, num_loss_tokens, grads, norm, self.params, count_E, gap)

    def _move_balance(self, count_E: dict[int, Tensor]) -> None:
        bias_E = {
            layer: moved_bias(self.balance.bias_E[layer], count, self.run.balance) for layer, count in count_E.items()
        }
        self.balance = BalanceInputs(lagged_count_E=count_E, bias_E=bias_E)
