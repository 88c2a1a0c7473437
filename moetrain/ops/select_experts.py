"""Token-choice selection of experts.

Shapes: T tokens, E experts (the null ones last), K experts per token, G segments (sequences) of the batch.
"""

from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor

from moetrain.config import moe as config
from moetrain.config.errors import nearest
from moetrain.config.moe import GroupRule
from moetrain.ops.native import OPS, refuse_second_derivative

Score = Literal[config.Score, "sqrtsoftplus"]  # the last one is of the operators alone, so far


@dataclass(frozen=True, slots=True)
class Selection:
    """Which experts each token chose, with what weight, and what balancing needs to know about it."""

    expert_id_TK: Tensor  # int32, most preferred first; -1: a null expert, or a token that is not valid
    weight_TK: Tensor  # at least float32; 0 where the id is -1
    prob_sum_GE: Tensor  # at least float32: probabilities summed over the valid tokens of each segment
    count_GE: Tensor  # int64: choices, null experts included
    bad_1: Tensor  # int32: 1 where a valid token had NaN or Inf; such tokens are left out of all else


class SelectOptions(TypedDict, total=False):
    """How experts are chosen, beside K: what ``select_experts``, ``route`` and their definitions take by keyword.

    Attributes:
        score: "softmax" weighs by softmax over all E, over the chosen ones if ``renormalise``; "topk_softmax" by
            softmax over the chosen logits (gpt-oss; its score is the logit); "sigmoid" (DeepSeek-V3) and
            "sqrtsoftplus" by s, or s / sum of chosen s if ``renormalise``. Not renormalised, a weight and its gradient
            are 0 where s is: in float32 below a logit of -87, of sqrtsoftplus -174. Default "softmax".
        bias_E: ``[E]``, added to the score for selection alone (Wang et al., 2408.15664); it has no gradient.
        num_null: the last ``num_null`` experts compute nothing (AdaMoE, 2406.13233); weights are renormalised over
            the true ones. Not together with groups. Default 0.
        num_groups: experts form so many equal groups (default 1) ...
        groups_kept: ... of which so many (default 1) are eligible: the best by ``group_rule``, ties to the lower group.
        group_rule: a group's worth is the sum of its two best biased scores ("top2_sum", the default; DeepSeek-V3), or
            its best ("max"; V2).
        renormalise: see ``score``. Default True.
        scale: multiplies the weights. Default 1.
        valid_T: bool ``[T]``; others choose nothing and count nowhere.
        segment_T: int32 ``[T]`` in ``[0, num_segments)`` where valid: whose statistics a token belongs to.
        num_segments: G. Default 1.
    """

    score: Score
    bias_E: Tensor | None
    num_null: int
    num_groups: int
    groups_kept: int
    group_rule: GroupRule
    renormalise: bool
    scale: float
    valid_T: Tensor | None
    segment_T: Tensor | None
    num_segments: int


_DEFAULTS: SelectOptions = {
    "score": "softmax",
    "bias_E": None,
    "num_null": 0,
    "num_groups": 1,
    "groups_kept": 1,
    "group_rule": "top2_sum",
    "renormalise": True,
    "scale": 1.0,
    "valid_T": None,
    "segment_T": None,
    "num_segments": 1,
}


def all_options(options: SelectOptions) -> SelectOptions:
    """What is given and the defaults of the rest, in the order of the operators' schemas.

    Raises:
        TypeError: there is no such option.
    """
    for name in options:
        if name not in _DEFAULTS:
            near = nearest(name, _DEFAULTS)
            raise TypeError(f"unknown option {name!r}; " + (f"did you mean {near!r}?" if near else "see SelectOptions"))
    return {**_DEFAULTS, **options}


def select_experts(logits_TE: Tensor, top_k: int, **options: Unpack[SelectOptions]) -> Selection:
    """Choose ``top_k`` experts per token in the order (score + bias descending, id ascending).

    Without a bias the logits are compared, in whose order every score is; so rounding makes no ties, and partitions
    and devices choose alike. ``prob_sum_GE`` sums softmax over all E, or s / sum s for the other scores. Shares (these,
    and renormalised weights) sum to 1 for any finite logits, also where the scores themselves are too small for their
    type: as softmax they depend on differences of logarithms alone.

    Args:
        logits_TE: float ``[T, E]``; arithmetic is done in at least float32. Rows may be apart in memory.
        top_k: K, at most the experts within ``groups_kept`` groups.
        options: see ``SelectOptions``.

    Returns:
        The selection. ``weight_TK`` and ``prob_sum_GE`` carry gradients to ``logits_TE``.

    Raises:
        TypeError: a wrong dtype, or an option that there is not.
        ValueError: wrong sizes, strides or options; on the CPU also a segment outside its range.
    """
    return Selection(*OPS.select_experts(logits_TE, top_k, *all_options(options).values()))


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@torch.library.register_fake("moetrain::select_experts")
def _select_experts_fake(logits_TE: Tensor, top_k: int, *options: Any) -> tuple[Tensor, ...]:
    num_tokens, num_experts = logits_TE.shape
    num_segments = options[-1]
    dtype = _at_least_fp32(logits_TE.dtype)
    return (
        logits_TE.new_empty(num_tokens, top_k, dtype=torch.int32),
        logits_TE.new_empty(num_tokens, top_k, dtype=dtype),
        logits_TE.new_empty(num_segments, num_experts, dtype=dtype),
        logits_TE.new_empty(num_segments, num_experts, dtype=torch.int64),
        logits_TE.new_empty(1, dtype=torch.int32),
    )


@torch.library.register_fake("moetrain::select_experts_backward")
def _select_experts_backward_fake(dweight_TK: Tensor, dprob_sum_GE: Tensor, logits_TE: Tensor, *options: Any) -> Tensor:
    return logits_TE.new_empty(logits_TE.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits_TE, _, score, _, num_null, _, _, _, renormalise, scale, valid_T, segment_T, _ = inputs
    expert_id_TK, _, _, count_GE, bad_1 = output
    ctx.mark_non_differentiable(expert_id_TK, count_GE, bad_1)
    ctx.save_for_backward(logits_TE, expert_id_TK, valid_T, segment_T)
    ctx.options = (score, num_null, renormalise, scale)


def _select_experts_backward(
    ctx: Any, _did: Tensor, dweight_TK: Tensor, dprob_sum_GE: Tensor, _dcount: Tensor, _dbad: Tensor
) -> tuple[Tensor | None, ...]:
    logits_TE, expert_id_TK, valid_T, segment_T = ctx.saved_tensors
    dlogits_TE = OPS.select_experts_backward(
        dweight_TK, dprob_sum_GE, logits_TE, expert_id_TK, *ctx.options, valid_T, segment_T
    )
    return dlogits_TE, *(None,) * 12


torch.library.register_autograd("moetrain::select_experts", _select_experts_backward, setup_context=_save)
refuse_second_derivative("select_experts")
