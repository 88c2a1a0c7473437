"""What makes a run another one: every field of a configuration by what it changes.

A run goes on in its folder as long as nothing changes what it learns. Another run that starts from its checkpoint may
learn otherwise, but has the same model.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, cast

from moetrain.config import RunConfig
from moetrain.config.load import to_dict
from moetrain.config.train import Dtype
from moetrain.data.mixing import PERIOD, apportion

# Where and how a run computes, and what it shows and keeps: no weight, but for the order of sums. Fewer or smaller GPUs
# need another balance of memory and time than those that wrote the checkpoint. The mesh may change as well: where
# something looks at micro-batches that does change what is learnt, and the run says so.
FREE_FIELDS = frozenset(
    {
        "run_dir",
        "train.activation_checkpoint",
        "train.device",
        "train.eval_every",
        "train.eval_rows",
        "train.final_eval_rows",
        "train.log_every",
        "train.overwrite",
        "train.reshard_after_forward",
        "train.threads",
        "train.timeout_s",
        "dispatch.pieces",
        "dispatch.pad_to_capacity",
        "moe.recompute_hidden",
        "checkpoint.every",
        "checkpoint.keep",
        "checkpoint.resume",
        "mesh.pp",
        "mesh.dp_replicate",
        "mesh.dp_shard",
        "mesh.cp",
        "mesh.tp",
        "mesh.edp",
        "mesh.ep",
        "mesh.etp",
        "mesh.ranks_per_node",
        "mesh.two_level",
        "placement.planner",
        "placement.slots",
        "placement.plan_every",
        "placement.predictor",
        "placement.calibrate",
        "placement.rematerialise",
        "placement.move_owners_every",
        "placement.trace",
        "sequence.planner",
        "sequence.capacity",
        "sequence.costs",
        "sequence.offload",
    }
)
# What is learnt, and from what. data.path is compared by what the dataset there holds.
LEARNING_FIELDS = frozenset(
    {
        "balance.scope",
        "balance.coef",
        "balance.z_loss_coef",
        "balance.loss_free",
        "balance.bias_rate",
        "dispatch.capacity_factor",
        "dispatch.capacity_by",
        "dispatch.rounding",
        "dispatch.tile",
        "data.path",
        "data.seq_len",
        "data.global_batch",
        "data.micro_batch",
        "data.packing",
        "data.context",
        "data.batch_tokens",
        "data.domain_weights",
        "model.init_std",
        "optim.name",
        "optim.lr",
        "optim.min_lr_ratio",
        "optim.warmup_steps",
        "optim.beta1",
        "optim.beta2",
        "optim.eps",
        "optim.weight_decay",
        "optim.clip_norm",
        "train.steps",
        "train.dtype",
        "seed",
    }
)
# The function that the weights are of: their names and shapes, and what is computed from them.
MODEL_FIELDS = frozenset(
    {
        "model.vocab_size",
        "model.num_layers",
        "model.width",
        "model.num_heads",
        "model.num_kv_heads",
        "model.head_dim",
        "model.attention",
        "model.rope_theta",
        "model.qk_norm",
        "model.qkv_bias",
        "model.tie_embeddings",
        "model.dense_first",
        "model.dense_width",
        "model.norm_eps",
        "moe.num_experts",
        "moe.top_k",
        "moe.expert_width",
        "moe.activation",
        "moe.num_shared_experts",
        "moe.shared_width",
        "moe.shared_gate",
        "moe.num_null_experts",
        "moe.expert_biases",
        "router.score",
        "router.renormalise",
        "router.weight_scale",
        "router.num_groups",
        "router.groups_kept",
        "router.group_rule",
    }
)
# How the first weights are drawn.
DRAWING_FIELDS = frozenset({"model.init_std"})
# Where a run began. Once it has a checkpoint they count for nothing, but those that are given must mean the same.
START_FIELDS = frozenset({"start.checkpoint", "start.optimizer", "start.position", "start.sha256"})


def config_differences(old: RunConfig, new: RunConfig, *, have_weights: bool = False) -> list[str]:
    """Fields that make ``new`` another run than ``old``, as ``"optim.lr was 0.003, is 0.001"``.

    Fields count for nothing where they have no effect in both, or mean the same in both; see ``without_effect`` and
    ``MEANINGS``.

    Args:
        old: what is gone on with.
        new: what it is gone on as.
        have_weights: whether they come from a checkpoint, so that none is drawn.
    """
    fields = LEARNING_FIELDS | MODEL_FIELDS
    return _differences(old, new, fields - DRAWING_FIELDS if have_weights else fields)


def computing_in(run: RunConfig, dtype: str | None) -> RunConfig:
    """``run`` with the type that its ``train.dtype`` has come to; None: unknown, it stays."""
    return run if dtype is None else replace(run, train=replace(run.train, dtype=cast(Dtype, dtype)))


def model_differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Those of them by which ``new`` has another model: it cannot take ``old``'s weights."""
    return _differences(old, new, MODEL_FIELDS)


def flat_config(run: RunConfig) -> dict[str, Any]:
    """Every field by its dotted name, as ``{"optim.lr": 0.003, ...}``; those that are None are left out."""
    return _flat(to_dict(run))


def pairs(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Names whose values differ, with both values; None for one that is not there."""
    names = [*left, *(name for name in right if name not in left)]
    return [(name, left.get(name), right.get(name)) for name in names if left.get(name) != right.get(name)]


def shortened(differences: Sequence[str], most: int = 4) -> str:
    """The first ``most`` of ``differences`` in one line, and how many more there are."""
    rest = [f"{len(differences) - most} more"] if len(differences) > most else []
    return "; ".join([*differences[:most], *rest])


def looks_at_micro_batches(run: RunConfig) -> list[str]:
    """Fields by which something sees where a rank's micro-batch ends; its size and the mesh then decide what is learnt.

    Without any, both only say how much of a step is computed at once, and where.
    """
    fields = {
        "dispatch.capacity_factor": run.dispatch.capacity_factor is not None,
        "dispatch.rounding": run.dispatch.rounding != "none",
        "balance.scope": _balance(run)[0] == "micro",
    }
    return [name for name, looks in fields.items() if looks]


def without_effect(run: RunConfig) -> frozenset[str]:
    """Fields that nothing reads in ``run``, given its others."""
    idle = {
        "data.micro_batch": run.plans_tokens or not looks_at_micro_batches(run),
        "data.seq_len": run.data.packing == "documents",
        "data.global_batch": run.data.packing == "documents",
        "data.context": run.data.packing == "rows",
        "data.batch_tokens": run.data.packing == "rows",
        "balance.coef": run.balance.scope == "none",
        "balance.scope": run.balance.coef == 0,
        "balance.bias_rate": not run.balance.loss_free,
        "dispatch.capacity_by": run.dispatch.capacity_factor is None,
        "dispatch.tile": run.dispatch.rounding == "none",
        "model.dense_width": run.model.dense_first == 0,
        "optim.beta1": run.optim.name == "sgd",
        "optim.beta2": run.optim.name == "sgd",
        "optim.eps": run.optim.name == "sgd",
        "router.group_rule": run.router.groups_kept == run.router.num_groups,
        "router.renormalise": run.router.score == "topk_softmax",  # whose weights sum to 1 as they are
        "train.steps": run.optim.min_lr_ratio == 1.0,  # else the learning rate falls towards the last step
    }
    return frozenset(name for name, is_idle in idle.items() if is_idle)


def _differences(old: RunConfig, new: RunConfig, fields: frozenset[str]) -> list[str]:
    olds, news = flat_config(old), flat_config(new)
    olds["data.path"], news["data.path"] = os.path.abspath(old.data.path), os.path.abspath(new.data.path)
    counting = fields - (without_effect(old) & without_effect(new)) - _meaning_same(old, new)
    names = sorted(name for name in olds.keys() | news.keys() if _field(name) in counting)
    return [
        f"{name} was {olds.get(name)!r}, is {news.get(name)!r}" for name in names if olds.get(name) != news.get(name)
    ]


def _meaning_same(old: RunConfig, new: RunConfig) -> frozenset[str]:
    """Fields that say the same in both, in whatever words."""
    return frozenset(name for names, meaning in MEANINGS.items() if meaning(old) == meaning(new) for name in names)


def _shares(run: RunConfig) -> Mapping[str, float]:
    """Rows of each domain in a period of the data's order, which is all that weights decide."""
    weights = {name: weight for name, weight in sorted(run.data.domain_weights.items()) if weight > 0}
    if not 0 < len(weights) <= PERIOD:
        return weights
    return dict(zip(weights, apportion(list(weights.values()), PERIOD), strict=True))


def _shared_width(run: RunConfig) -> int:
    return run.moe.shared_hidden


def _balance(run: RunConfig) -> tuple[str, float]:
    """Scope and factor of the balance loss; without the factor there is no loss."""
    is_off = run.balance.scope == "none" or run.balance.coef == 0
    return ("none", 0.0) if is_off else (run.balance.scope, run.balance.coef)


def _groups(run: RunConfig) -> tuple[int, int]:
    """Groups of experts, and how many are kept; all of them is as if there were none."""
    kept = run.router.groups_kept
    return (1, 1) if kept == run.router.num_groups else (run.router.num_groups, kept)


# Fields that say one thing together, or on a scale of their own, and what that is.
MEANINGS: MappingProxyType[tuple[str, ...], Callable[[RunConfig], object]] = MappingProxyType(
    {
        ("data.domain_weights",): _shares,
        ("moe.num_shared_experts", "moe.shared_width"): _shared_width,
        ("balance.scope", "balance.coef"): _balance,
        ("router.num_groups", "router.groups_kept"): _groups,
    }
)


def _field(name: str) -> str:
    """The field that a flat name is of: a domain's weight is one of ``data.domain_weights``."""
    return "data.domain_weights" if name.startswith("data.domain_weights.") else name


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
