"""A decoder-only transformer with MoE layers.

Shapes: T tokens of a tp group, t = ceil(T / tp) of them here, D width, V vocabulary, v of it here.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from moetrain.config import ModelConfig, MoEConfig
from moetrain.mesh.tensor_parallel import Cut, TensorParallel
from moetrain.models import names
from moetrain.models.attention import Attention, AttentionPlan, plan_attention
from moetrain.models.loss import linear_cross_entropy_sum
from moetrain.models.norm import RMSNorm
from moetrain.moe.context import MoEContext, RoutingMemo, checkpoint_contexts
from moetrain.moe.experts import SharedExpert
from moetrain.moe.layer import MoELayer
from moetrain.sequence.batch import PackedBatch
from moetrain.sequence.ring import Ring


class ModelOutput(NamedTuple):
    """What one forward pass gives; a tuple, so that FSDP finds the tensors in it.

    ``ce_sum`` and ``aux`` are scalars of at least float32: the cross-entropy summed over loss tokens, the same on all
    ranks of a tp group, and the layers' auxiliary losses of the tokens here, already divided by the step's tokens.
    ``logits_TV`` is there where it was asked for.
    """

    ce_sum: Tensor
    aux: Tensor
    logits_TV: Tensor | None = None


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)), where the MLP is dense or a MoE layer."""

    def __init__(
        self,
        config: ModelConfig,
        moe: MoEConfig,
        moe_layer: MoELayer | None,
        activation_checkpoint: bool,
        tp: TensorParallel,
    ) -> None:
        """A block with ``moe_layer``, or with a dense MLP of the experts' activation where that is None."""
        super().__init__()
        self.activation_checkpoint = activation_checkpoint
        self.attn_norm = RMSNorm(config.width, config.norm_eps)
        self.attn = Attention(config, tp)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        if moe_layer is None:
            self.mlp = SharedExpert(config.width, config.dense_width, moe.activation, gate=False, tp=tp)
        else:
            self.moe = moe_layer

    def forward(self, x_tD: Tensor, plan: AttentionPlan, ctx: MoEContext) -> tuple[Tensor, Tensor]:
        """[t, D] -> ([t, D], auxiliary loss); recomputed in the backward pass if so configured."""
        if not (self.activation_checkpoint and torch.is_grad_enabled()):
            return self._forward(x_tD, plan, ctx, None)
        saved: tuple[Tensor, Tensor] = checkpoint(
            self._forward,
            x_tD,
            plan,
            ctx,
            RoutingMemo(),
            use_reentrant=False,
            preserve_rng_state=False,  # nothing random happens inside a block
            context_fn=checkpoint_contexts,
        )
        return saved

    def _forward(
        self, x_tD: Tensor, plan: AttentionPlan, ctx: MoEContext, memo: RoutingMemo | None
    ) -> tuple[Tensor, Tensor]:
        if hasattr(self, "moe"):
            return self._forward_moe(x_tD, plan, ctx, memo)
        x_tD = x_tD + self.attn(self.attn_norm(x_tD), plan, ctx.num_tokens, memo)
        y_tD = self.mlp(self.mlp_norm(x_tD), ctx.num_tokens)
        aux = torch.zeros((), dtype=torch.promote_types(x_tD.dtype, torch.float32), device=x_tD.device)
        return x_tD + y_tD, aux

    def _forward_moe(
        self, x_tD: Tensor, plan: AttentionPlan, ctx: MoEContext, memo: RoutingMemo | None
    ) -> tuple[Tensor, Tensor]:
        """While attention is computed, experts' weights are under way, and in the backward pass their gradients."""
        x_tD, use = self.moe.begin(x_tD, memo)
        x_tD = use.before_experts(x_tD + self.attn(self.attn_norm(x_tD), plan, ctx.num_tokens, memo))
        y_tD, aux = self.moe(self.mlp_norm(x_tD), ctx, memo, use)
        return x_tD + use.after_experts(y_tD), aux


class TokenEmbedding(nn.Module):
    """Rows of ``weight`` [v, D] by token id; a tp group's ranks have v rows each of the vocabulary."""

    def __init__(self, vocab_size: int, width: int, tp: TensorParallel) -> None:
        """``vocab_size`` is V, at least the ranks of ``tp``."""
        super().__init__()
        self.tp = tp
        self.rows = tp.cut(0, vocab_size)
        self.weight = nn.Parameter(torch.zeros(self.rows.size, width))

    def forward(self, token_id_T: Tensor) -> Tensor:
        """[T] -> [t, D]."""
        row_T = token_id_T - self.rows.start
        if self.tp.size == 1:
            return functional.embedding(row_T, self.weight)
        is_here_T1 = ((row_T >= 0) & (row_T < self.rows.size))[:, None]
        x_TD = functional.embedding(row_T.clamp(0, self.rows.size - 1), self.weight)
        return self.tp.scatter_sum(x_TD.masked_fill(~is_here_T1, 0))


class Transformer(nn.Module):
    """Embedding, blocks, final norm and head. It knows neither ranks nor where experts live."""

    def __init__(
        self,
        config: ModelConfig,
        moe: MoEConfig,
        moe_layer: Callable[[int], MoELayer],
        activation_checkpoint: bool = False,
        tp: TensorParallel | None = None,
    ) -> None:
        """A transformer whose layers ``config.moe_layers`` are ``moe_layer(layer_idx)``.

        Args:
            config: the network.
            moe: its experts; dense layers share their activation.
            moe_layer: makes a module (x_TD, ctx, memo) -> (y_TD, auxiliary loss).
            activation_checkpoint: keep only each block's input and routing, and recompute the rest.
            tp: this rank's place among those that hold parts of the same layers; alone where it is left out.
        """
        super().__init__()
        self.config = config
        self.tp = tp or TensorParallel()
        self.embed = TokenEmbedding(config.vocab_size, config.width, self.tp)
        self.layers = nn.ModuleList(
            Block(config, moe, moe_layer(idx) if idx in config.moe_layers else None, activation_checkpoint, self.tp)
            for idx in range(config.num_layers)
        )
        self.final_norm = RMSNorm(config.width, config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.width, self.embed.rows.size, bias=False)

    def cuts(self) -> dict[str, Cut]:
        """By name, the parameters of which this rank has a part; it has all of the others."""
        cuts = {names.EMBEDDING: self.embed.rows}
        if not self.config.tie_embeddings:
            cuts[names.HEAD] = self.embed.rows
        for stem, module in self.named_modules():
            if isinstance(module, Attention | SharedExpert):
                cuts |= {f"{stem}.{name}": cut for name, cut in module.cuts().items()}
        return {name: cut for name, cut in cuts.items() if cut.size < cut.total}

    def forward(
        self,
        batch: PackedBatch,
        *,
        num_step_tokens: int,
        random_key: int = 0,
        ring: Ring | None = None,
        with_logits: bool = False,
    ) -> ModelOutput:
        """Summed losses of one micro-batch, which may have no tokens.

        Args:
            batch: documents, or this rank's pieces of them, on the model's device.
            num_step_tokens: tokens of the whole optimizer step, over all ranks and micro-batches.
            random_key: of (seed, step, round); see ``MoEContext``.
            ring: of the batch's gang, which all ranks of it enter together; None where it has none.
            with_logits: also give all logits, which training never holds.
        """
        x_tD, aux = self._hidden(batch, num_step_tokens, random_key, ring)
        x_TD = self.tp.gather(x_tD, batch.num_tokens)
        ce_sum = linear_cross_entropy_sum(x_TD, self._head(), batch.target_T, tp=self.tp, rows=self.embed.rows)
        if not with_logits:
            return ModelOutput(ce_sum, aux)
        logits_Tv = functional.linear(x_TD, self._head())
        return ModelOutput(ce_sum, aux, self.tp.whole(logits_Tv, replace(self.embed.rows, dim=1)))

    def logits(self, batch: PackedBatch) -> Tensor:
        """[T, V] without gradients, for sampling and for tests. Collective where the model is sharded or cut."""
        with torch.no_grad():
            logits_TV: Tensor | None = self(batch, num_step_tokens=1, with_logits=True).logits_TV
        assert logits_TV is not None
        return logits_TV

    def _head(self) -> Tensor:
        return self.embed.weight if self.config.tie_embeddings else self.lm_head.weight

    def _hidden(
        self, batch: PackedBatch, num_step_tokens: int, random_key: int, ring: Ring | None
    ) -> tuple[Tensor, Tensor]:
        x_tD, device = self.embed(batch.token_id_T), batch.token_id_T.device
        plan = plan_attention(batch, self.config, x_tD.dtype, ring)
        gid_T2 = batch.token_gids().to(device, non_blocking=True)
        is_token_T = torch.ones(batch.num_tokens, dtype=torch.bool, device=device)
        ctx = MoEContext(
            valid_T=self.tp.local(is_token_T, padding=False),
            token_gid_T2=self.tp.local(gid_T2, padding=-1),
            num_step_tokens=num_step_tokens,
            training=self.training and torch.is_grad_enabled(),
            random_key=random_key,
            num_tokens=batch.num_tokens,
        )
        aux = torch.zeros((), dtype=torch.promote_types(x_tD.dtype, torch.float32), device=x_tD.device)
        for block in self.layers:
            x_tD, block_aux = block(x_tD, plan, ctx)
            aux = aux + block_aux
        return self.final_norm(x_tD), aux
