"""The scaled-down run that is compared: small, but with every feature of the model in it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from moetrain.config import RunConfig
from moetrain.config.errors import require
from moetrain.config.load import run_from_dict
from moetrain.config.options import dashed, options

MICRO_BATCH = 2  # packed rows of one rank and round
SEQ_LEN = 16
CAPACITY = 24  # tokens of a rank and round, where sequences are documents
VOCAB_SIZE = 61
VOCAB_SIZE_ROUNDING = 997  # two documents that begin alike are a tie between tokens, which rounding has to break
DTYPES = ("float32", "float64")  # a lower one has no tolerance worth proving with

# Fields that have a shorter name in `moetrain verify`.
SHORT: MappingProxyType[str, str] = MappingProxyType(
    {
        "optimizer": "optim.name",
        "dtype": "train.dtype",
        "router": "router.score",
        "balance": "balance.scope",
        "num_experts": "moe.num_experts",
        "top_k": "moe.top_k",
        "shared_experts": "moe.num_shared_experts",
        "dense_first": "model.dense_first",
        "num_groups": "router.num_groups",
        "groups_kept": "router.groups_kept",
        "activation": "moe.activation",
        "rounding": "dispatch.rounding",
        "tile": "dispatch.tile",
        "capacity_factor": "dispatch.capacity_factor",
        "capacity_by": "dispatch.capacity_by",
        "pad_to_capacity": "dispatch.pad_to_capacity",
        "dispatch_pieces": "dispatch.pieces",
        "sequence": "sequence.planner",
        "capacity": "sequence.capacity",
        "offload": "sequence.offload",
        "two_level": "mesh.two_level",
        "ranks_per_node": "mesh.ranks_per_node",
        "placement": "placement.planner",
        "slots": "placement.slots",
        "plan_every": "placement.plan_every",
        "calibrate": "placement.calibrate",
        "rematerialise": "placement.rematerialise",
        "tie_embeddings": "model.tie_embeddings",
        "activation_checkpoint": "train.activation_checkpoint",
        "reshard_after_forward": "train.reshard_after_forward",
    }
)
TABLES = ("model", "moe", "router", "balance", "dispatch", "optim")  # whose fields may be set, besides those of SHORT

SMALL: MappingProxyType[str, Any] = MappingProxyType(
    {
        "model.vocab_size": VOCAB_SIZE,
        "model.dense_first": 1,
        "model.dense_width": 40,
        "model.width": 48,
        "model.num_heads": 24,
        "model.num_kv_heads": 12,
        "model.head_dim": 8,
        "model.norm_eps": 1e-2,  # else a short vector makes rounding of float32 as large as the tolerance
        "model.qk_norm": True,
        "model.qkv_bias": True,
        "moe.num_experts": 8,
        "moe.top_k": 2,
        "moe.expert_width": 24,
        "moe.num_shared_experts": 1,
        "router.score": "softmax",
        "balance.scope": "lagged",
        "balance.coef": 0.1,
        "balance.z_loss_coef": 0.01,
        "balance.bias_rate": 0.05,
        "dispatch.tile": 4,
        "data.seq_len": SEQ_LEN,
        "data.micro_batch": MICRO_BATCH,
        "optim.name": "sgd",
        "train.dtype": "float32",
        "train.device": "cpu",
        "train.threads": 1,
    }
)
# Clipping acts, and rates are large enough that a wrong gradient shows in the parameters. AdamW divides by |g| + eps in
# its first step. With the usual eps = 1e-8, rounding of a gradient that is truly zero would move a parameter by the
# whole learning rate; 1e-3 makes the update a well-conditioned function of the gradient, so that it can be held to the
# same tolerance.
OF_OPTIMIZER: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {
        "sgd": {"optim.lr": 1.0, "optim.warmup_steps": 2, "optim.clip_norm": 0.5},
        "adamw": {"optim.lr": 0.02, "optim.warmup_steps": 0, "optim.clip_norm": 0.5, "optim.eps": 1e-3},
    }
)


def small_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of the scaled-down run by dotted name, those that are ``given`` laid over the others.

    Raises:
        ValueError: a field that is set by another option, or that decides nothing here.
    """
    for name in given:
        decided_here = name in options() and name not in SHORT.values() and name.partition(".")[0] not in TABLES
        require(
            not decided_here,
            f"--{dashed(name)} does not apply here: `moetrain verify` sets what is not of the tables "
            f"{', '.join(TABLES)} itself; see moetrain verify --help",
        )
    joined = {**SMALL, **given}
    sigmoid = joined["router.score"] == "sigmoid"
    implied = {
        "moe.shared_gate": joined["moe.num_shared_experts"] > 0,
        "router.weight_scale": 2.5 if sigmoid else 1.0,
        "balance.loss_free": sigmoid,
        **({"model.vocab_size": VOCAB_SIZE_ROUNDING} if given.get("dispatch.rounding", "none") != "none" else {}),
        **OF_OPTIMIZER.get(joined["optim.name"], {}),
    }
    return {**SMALL, **implied, **given}


def run_of_fields(fields: Mapping[str, Any]) -> RunConfig:
    """The run that has ``fields``, by dotted name, and defaults."""
    tables: dict[str, Any] = {}
    for name, value in fields.items():
        table, _, leaf = name.rpartition(".")
        (tables.setdefault(table, {}) if table else tables)[leaf] = value
    return run_from_dict(tables)


def flattened(tables: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Fields by dotted name, of nested tables."""
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
