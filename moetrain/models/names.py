"""Logical names of parameters and of what is kept for them: the same on any mesh, so a checkpoint loads under any.

A model's own parameters have the names that torch gives them (``embed.weight``, ``layers.0.attn.q.weight``,
``layers.0.moe.router.weight``). Experts are not among them. One layer's are ``layers.{l}.moe.experts``: whole,
``.w_in`` [E, 2 or 1, F, D] and ``.w_out`` [E, D, F]; in checkpoints a tensor per expert and matrix, as
``layers.{l}.moe.experts.{e}.w_in``.
"""

from typing import Literal

EMBEDDING = "embed.weight"
HEAD = "lm_head.weight"

Matrix = Literal["w_in", "w_out"]
MATRICES: tuple[Matrix, ...] = ("w_in", "w_out")  # in the order of an expert's logical vector


def experts_of(layer: int) -> str:
    """The experts of one layer."""
    return f"layers.{layer}.moe.experts"


def stacked(layer: int, matrix: Matrix) -> str:
    """One matrix of all experts of a layer.

    >>> stacked(3, "w_in")
    'layers.3.moe.experts.w_in'
    """
    return f"{experts_of(layer)}.{matrix}"


def expert(layer: int, expert_id: int, matrix: Matrix) -> str:
    """One matrix of one expert.

    >>> expert(3, 17, "w_out")
    'layers.3.moe.experts.17.w_out'
    """
    return f"{experts_of(layer)}.{expert_id}.{matrix}"


def moment(of: str, name: str) -> str:
    """A running moment of the optimizer (``exp_avg``, ``exp_avg_sq``) of the parameter called ``name``."""
    return f"optim.{of}.{name}"


def is_moment(name: str) -> bool:
    """Whether an entry of a checkpoint is a moment."""
    return name.startswith("optim.")


def balance(layer: int, kept: str) -> str:
    """What balancing keeps of one layer: ``lagged_count_E``, ``bias_E``."""
    return f"balance.layers.{layer}.{kept}"


def balance_of_all_layers(kept: str) -> str:
    """The same in checkpoints that had all MoE layers as rows of one tensor.

    >>> balance_of_all_layers("bias_E")
    'balance.bias_LE'
    """
    return f"balance.{kept.removesuffix('E')}LE"


def is_balance(name: str) -> bool:
    """Whether an entry of a checkpoint is what balancing keeps."""
    return name.startswith("balance.")


def logical(raw: str) -> str:
    """A parameter's name without what activation checkpointing or compilation put around its module."""
    return raw.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def is_norm(name: str) -> bool:
    """Whether a parameter scales a norm: ones at first, never decayed."""
    return name.endswith("norm.weight")


def is_bias(name: str) -> bool:
    """Whether a parameter is a bias: zeros at first, never decayed."""
    return name.endswith(".bias")


def is_output_projection(name: str) -> bool:
    """Whether a parameter projects back into the residual stream."""
    return name.endswith((".attn.o.weight", ".w_out"))
