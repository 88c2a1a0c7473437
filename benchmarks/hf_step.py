"""The same model trained with Hugging Face transformers, torch's DDP and AdamW: what bench_step.py compares with.

Mixtral's code computes what moetrain's plain configuration does, Qwen3-MoE's what it does with ``model.qk_norm``. The
weights are ours, so that the first loss must be ours too. In its favour: AdamW is the fused one, and where moetrain
computes in bfloat16 with float32 masters, this loop holds everything in bfloat16, or computes in float32 if that is
faster.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from moetrain.config import RunConfig

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
_COPIED_WEIGHTS_LIMIT = 1 << 31  # bytes; batched_mm keeps a copy of an expert's matrices per pair and layer


@dataclass(frozen=True, slots=True)
class Layout:
    """How the loop runs.

    An implementation of the experts, on all ranks (DDP) or on one with all cores, in one type; ``cut`` parts of each
    of our micro-batches are its own, since what is best for us need not be for it.
    """

    implementation: str
    ddp: bool
    dtype: torch.dtype
    cut: int = 1

    def __str__(self) -> str:
        where, dtype = "DDP" if self.ddp else "one process", str(self.dtype).removeprefix("torch.")
        cut = "" if self.cut == 1 else f", micro-batches cut in {self.cut}"
        return f"transformers {self.implementation}, {where}, {dtype}{cut}"


class HuggingFaceLoop:
    """Model and optimizer of one rank; ``step`` is collective under DDP."""

    def __init__(self, run: RunConfig, layout: Layout, parameters: Mapping[str, Tensor], num_ranks: int) -> None:
        """Build the model of ``run`` with ``parameters`` as ``WholeTensors.parameters`` gives them.

        Raises:
            ImportError: transformers is not installed.
            ValueError: the model has something that neither of its two models has.
        """
        model = build_model(run, layout.implementation)
        load_weights(model, parameters)
        model.to(layout.dtype).train()
        self.run, self.layout, self.num_ranks = run, layout, num_ranks if layout.ddp else 1
        self.model: nn.Module = DistributedDataParallel(model) if layout.ddp else model
        optim = run.optim
        decayed = [value for value in model.parameters() if value.dim() > 1]
        others = [value for value in model.parameters() if value.dim() <= 1]
        groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}]
        betas = (optim.beta1, optim.beta2)
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=True)

    def num_parameters(self) -> int:
        """Parameters of the whole model."""
        return sum(value.numel() for value in self.model.parameters())

    def step(self, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
        """One optimizer step on this rank's (tokens, targets); returns its cross-entropy per token."""
        run = self.run
        num_step_tokens = run.data.global_batch * run.data.seq_len
        ce_sum, num_tokens = 0.0, 0
        for idx, (token_BS, target_BS) in enumerate(batches):
            with self._sync(last=idx == len(batches) - 1):
                output = self.model(input_ids=token_BS, use_cache=False, output_router_logits=True)
                logits_TV = output.logits.flatten(0, 1).float()
                ce = functional.cross_entropy(logits_TV, target_BS.flatten(), reduction="sum")
                aux = run.balance.coef * output.aux_loss * token_BS.numel()
                # DDP takes the mean over ranks.
                ((ce + aux) * (self.num_ranks / num_step_tokens)).backward()
            ce_sum += ce.item()
            num_tokens += token_BS.numel()
        if run.optim.clip_norm:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), run.optim.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return ce_sum / max(1, num_tokens)

    def _sync(self, *, last: bool) -> Any:
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()


def layouts(run: RunConfig, num_ranks: int, compute: torch.dtype) -> list[Layout]:
    """All that are worth trying where ours computes in ``compute``."""
    dtypes = (torch.bfloat16, torch.float32) if compute == torch.bfloat16 else (compute,)
    return [
        Layout(name, ddp, dtype)
        for ddp in ((True, False) if num_ranks > 1 else (False,))
        for dtype in dtypes
        for name in IMPLEMENTATIONS
        if name != "batched_mm" or copied_weight_bytes(run, dtype) <= _COPIED_WEIGHTS_LIMIT
    ]


def copied_weight_bytes(run: RunConfig, dtype: torch.dtype) -> int:
    """What batched_mm keeps for the backward pass of one micro-batch."""
    pairs = run.data.micro_batch * run.data.seq_len * run.moe.top_k
    return run.model.num_layers * pairs * 3 * run.moe.expert_width * run.model.width * dtype.itemsize


def build_model(run: RunConfig, implementation: str) -> nn.Module:
    """``MixtralForCausalLM``, or ``Qwen3MoeForCausalLM`` where queries and keys are normalised."""
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    refuse_foreign_features(run)
    model, moe = run.model, run.moe
    shared: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "max_position_embeddings": run.data.seq_len,
        "tie_word_embeddings": model.tie_embeddings,
        "num_experts_per_tok": moe.top_k,
        "attn_implementation": "sdpa",
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if model.qk_norm:
        config = Qwen3MoeConfig(
            **shared,
            num_experts=moe.num_experts,
            moe_intermediate_size=moe.expert_width,
            norm_topk_prob=run.router.renormalise,
            attention_bias=model.qkv_bias,
        )
        config._experts_implementation = implementation
        return Qwen3MoeForCausalLM(config)
    config = MixtralConfig(**shared, num_local_experts=moe.num_experts, intermediate_size=moe.expert_width)
    config._experts_implementation = implementation
    return MixtralForCausalLM(config)


def refuse_foreign_features(run: RunConfig) -> None:
    """Raise where neither Mixtral nor Qwen3-MoE computes what ``run`` says."""
    model, moe = run.model, run.moe
    wanted = {
        "model.dense_first": (model.dense_first, 0),
        "model.qkv_bias": (model.qkv_bias, False),
        "moe.activation": (moe.activation, "swiglu"),
        "router.score": (run.router.score, "softmax"),
        "router.renormalise": (run.router.renormalise or model.qk_norm, True),
        "router.weight_scale": (run.router.weight_scale, 1.0),
        "router.num_groups": (run.router.num_groups, 1),
        "balance.loss_free": (run.balance.loss_free, False),
        "the shared expert's width": (moe.shared_hidden, 0),
    }
    for name, (value, needed) in wanted.items():
        if value != needed:
            raise ValueError(
                f"--peer hf: {name} must be {needed!r} for Mixtral's or Qwen3-MoE's code to be the same model, "
                f"got {value!r}; leave --peer out or change the model"
            )


@torch.no_grad()
def load_weights(model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
    """Copy ours in; every parameter of ``model`` must get a value.

    Raises:
        ValueError: names do not match one to one.
    """
    theirs = dict(model.named_parameters())
    given = {foreign_name(name): value for name, value in parameters.items()}
    if wrong := sorted(given.keys() ^ theirs.keys()):
        raise ValueError(f"--peer hf: parameters must match one to one, but {', '.join(wrong[:4])} have no counterpart")
    for name, value in given.items():
        theirs[name].copy_(value.reshape(theirs[name].shape))


_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "moe.router.weight": "mlp.gate.weight",
    "moe.experts.w_in": "mlp.experts.gate_up_proj",
    "moe.experts.w_out": "mlp.experts.down_proj",
    **{f"attn.{part}.weight": f"self_attn.{part}_proj.weight" for part in "qkvo"},
    **{f"attn.{part}_norm.weight": f"self_attn.{part}_norm.weight" for part in "qk"},
}


def foreign_name(name: str) -> str:
    """What transformers calls the parameter that is ``name`` here."""
    if not name.startswith("layers."):
        return _NAMES.get(name, name)
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{_NAMES.get(rest, rest)}"
