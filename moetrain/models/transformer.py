"""A decoder-only transformer with MoE layers. Shapes: B rows, S tokens per row, T = B * S, D width, V vocabulary."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from moetrain.config import ModelConfig, MoEConfig
from moetrain.models.attention import Attention, AttentionPlan, plan_attention
from moetrain.models.loss import linear_cross_entropy_sum
from moetrain.models.norm import RMSNorm
from moetrain.moe.context import MoEContext, RoutingMemo, checkpoint_contexts
from moetrain.moe.experts import SharedExpert
from moetrain.sequence.batch import PackedBatch


class ModelOutput(NamedTuple):
    """What one forward pass gives; a tuple, so that FSDP finds the tensors in it.

    ``ce_sum`` and ``aux`` are scalars of at least float32: the cross-entropy summed over loss tokens, and the layers'
    auxiliary losses, already divided by the step's tokens. ``logits_BSV`` is there where it was asked for.
    """

    ce_sum: Tensor
    aux: Tensor
    logits_BSV: Tensor | None = None


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)), where the MLP is dense or a MoE layer."""

    def __init__(
        self, config: ModelConfig, moe: MoEConfig, moe_layer: nn.Module | None, activation_checkpoint: bool
    ) -> None:
        """A block with ``moe_layer``, or with a dense MLP of the experts' activation where that is None."""
        super().__init__()
        self.activation_checkpoint = activation_checkpoint
        self.attn_norm = RMSNorm(config.width, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.width, config.norm_eps)
        if moe_layer is None:
            self.mlp = SharedExpert(config.width, config.dense_width, moe.activation, gate=False)
        else:
            self.moe = moe_layer

    def forward(self, x_BSD: Tensor, plan: AttentionPlan, ctx: MoEContext) -> tuple[Tensor, Tensor]:
        """[B, S, D] -> ([B, S, D], auxiliary loss); recomputed in the backward pass if so configured."""
        if not (self.activation_checkpoint and torch.is_grad_enabled()):
            return self._forward(x_BSD, plan, ctx, None)
        saved: tuple[Tensor, Tensor] = checkpoint(
            self._forward,
            x_BSD,
            plan,
            ctx,
            RoutingMemo(),
            use_reentrant=False,
            preserve_rng_state=False,  # nothing random happens inside a block
            context_fn=checkpoint_contexts,
        )
        return saved

    def _forward(
        self, x_BSD: Tensor, plan: AttentionPlan, ctx: MoEContext, memo: RoutingMemo | None
    ) -> tuple[Tensor, Tensor]:
        x_BSD = x_BSD + self.attn(self.attn_norm(x_BSD), plan)
        normed_TD = self.mlp_norm(x_BSD).flatten(0, 1)
        if hasattr(self, "moe"):
            y_TD, aux = self.moe(normed_TD, ctx, memo)
        else:
            y_TD = self.mlp(normed_TD)
            aux = torch.zeros((), dtype=torch.promote_types(x_BSD.dtype, torch.float32), device=x_BSD.device)
        return x_BSD + y_TD.unflatten(0, x_BSD.shape[:2]), aux


class Transformer(nn.Module):
    """Embedding, blocks, final norm and head. It knows neither ranks nor where experts live."""

    def __init__(
        self,
        config: ModelConfig,
        moe: MoEConfig,
        moe_layer: Callable[[int], nn.Module],
        activation_checkpoint: bool = False,
    ) -> None:
        """A transformer whose layers ``config.moe_layers`` are ``moe_layer(layer_idx)``.

        Args:
            config: the network.
            moe: its experts; dense layers share their activation.
            moe_layer: makes a module (x_TD, ctx, memo) -> (y_TD, auxiliary loss).
            activation_checkpoint: keep only each block's input and routing, and recompute the rest.
        """
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(
            Block(config, moe, moe_layer(idx) if idx in config.moe_layers else None, activation_checkpoint)
            for idx in range(config.num_layers)
        )
        self.final_norm = RMSNorm(config.width, config.norm_eps)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(
        self, batch: PackedBatch, *, num_step_tokens: int, random_key: int = 0, with_logits: bool = False
    ) -> ModelOutput:
        """Summed losses of one micro-batch, which may have no rows.

        Args:
            batch: packed rows on the model's device.
            num_step_tokens: valid tokens of the whole optimizer step, over all ranks and micro-batches.
            random_key: of (seed, step, round); see ``MoEContext``.
            with_logits: also give all logits, which training never holds.
        """
        x_TD, aux = self._hidden(batch, num_step_tokens, random_key)
        ce_sum = linear_cross_entropy_sum(x_TD, self._head(), batch.target_BS.flatten())
        if not with_logits:
            return ModelOutput(ce_sum, aux)
        logits_TV = functional.linear(x_TD, self._head())
        return ModelOutput(ce_sum, aux, logits_TV.unflatten(0, batch.token_id_BS.shape))

    def logits(self, batch: PackedBatch) -> Tensor:
        """[B, S, V] without gradients, for sampling and for tests. Collective where the model is sharded."""
        with torch.no_grad():
            logits_BSV: Tensor | None = self(batch, num_step_tokens=1, with_logits=True).logits_BSV
        assert logits_BSV is not None
        return logits_BSV

    def _head(self) -> Tensor:
        return self.embed.weight if self.config.tie_embeddings else self.lm_head.weight

    def _hidden(self, batch: PackedBatch, num_step_tokens: int, random_key: int) -> tuple[Tensor, Tensor]:
        x_BSD = self.embed(batch.token_id_BS)
        plan = plan_attention(batch.position_BS, batch.document_BS, self.config, x_BSD.dtype)
        ctx = MoEContext(
            valid_T=batch.valid().flatten(),
            token_gid_T2=token_gids(batch),
            num_step_tokens=num_step_tokens,
            training=self.training and torch.is_grad_enabled(),
            random_key=random_key,
        )
        aux = torch.zeros((), dtype=torch.promote_types(x_BSD.dtype, torch.float32), device=x_BSD.device)
        for block in self.layers:
            x_BSD, block_aux = block(x_BSD, plan, ctx)
            aux = aux + block_aux
        return self.final_norm(x_BSD).flatten(0, 1), aux


def token_gids(batch: PackedBatch) -> Tensor:
    """int64 [T, 2]: each token's row id and its place in that row, the same wherever the row is computed."""
    num_rows, seq_len = batch.token_id_BS.shape
    place_BS = torch.arange(seq_len, device=batch.token_id_BS.device).expand(num_rows, seq_len)
    row_BS = batch.sequence_id_B[:, None].expand(num_rows, seq_len)
    return torch.stack((row_BS, place_BS), dim=-1).flatten(0, 1)
