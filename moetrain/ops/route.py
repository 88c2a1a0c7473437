"""Routing in one operator: choose experts, weigh them, and group the choices by expert.

Shapes: T tokens, E experts (the null ones last), K experts per token, N = T * K pairs, G segments (sequences).
"""

from dataclasses import dataclass
from typing import Any, Unpack

import torch
from torch import Tensor

from moetrain.ops.native import OPS, refuse_second_derivative
from moetrain.ops.select_experts import SelectOptions, all_options


@dataclass(frozen=True, slots=True)
class Routed:
    """(token, expert, weight) pairs, experts ascending and tokens ascending inside an expert, with their statistics.

    The pairs of expert e are ``offset_E1[e] : offset_E1[e + 1]``. Choices of no true expert follow ``offset_E1[-1]``
    with weight 0, and are ignored by whatever reads the list.
    """

    token_N: Tensor  # int32
    weight_N: Tensor  # at least float32
    offset_E1: Tensor  # int32, over the true experts
    expert_id_TK: Tensor  # int32, most preferred first; -1: a null expert, or a token that is not valid
    place_TK: Tensor  # int32: which pair each choice became
    prob_sum_GE: Tensor  # at least float32: probabilities summed over the valid tokens of each segment
    count_GE: Tensor  # int64: choices, null experts included
    bad_1: Tensor  # int32: 1 where a valid token had NaN or Inf; such tokens are left out of all else


def route(logits_TE: Tensor, top_k: int, **options: Unpack[SelectOptions]) -> Routed:
    """Choose ``top_k`` experts per token and list the choices by expert.

    To the bit what ``select_experts``, ``group_pairs`` and a gather of the weights give, in two passes over the tokens:
    the first scores, chooses, weighs, counts and looks for NaN and Inf, the second writes the list. On the CPU the same
    bits come for any number of threads, and nothing of [T, E] is written.

    Args:
        logits_TE: float ``[T, E]``; arithmetic is done in at least float32. Rows may be apart in memory.
        top_k: K, at most the experts within ``groups_kept`` groups. T * K must be below 2**31.
        options: see ``SelectOptions``.

    Returns:
        The pairs. ``weight_N`` and ``prob_sum_GE`` carry gradients to ``logits_TE``.

    Raises:
        TypeError: a wrong dtype, or an option that there is not.
        ValueError: wrong sizes, strides or options; on the CPU also a segment outside its range.
    """
    return Routed(*OPS.route(logits_TE, top_k, *all_options(options).values()))


@torch.library.register_fake("moetrain::route")
def _route_fake(
    logits_TE: Tensor, top_k: int, score: str, bias_E: Tensor | None, num_null: int, *options: Any
) -> tuple[Tensor, ...]:
    num_tokens, num_experts = logits_TE.shape
    num_segments = options[-1]
    dtype = torch.promote_types(logits_TE.dtype, torch.float32)
    return (
        logits_TE.new_empty(num_tokens * top_k, dtype=torch.int32),
        logits_TE.new_empty(num_tokens * top_k, dtype=dtype),
        logits_TE.new_empty(num_experts - num_null + 1, dtype=torch.int32),
        logits_TE.new_empty(num_tokens, top_k, dtype=torch.int32),
        logits_TE.new_empty(num_tokens, top_k, dtype=torch.int32),
        logits_TE.new_empty(num_segments, num_experts, dtype=dtype),
        logits_TE.new_empty(num_segments, num_experts, dtype=torch.int64),
        logits_TE.new_empty(1, dtype=torch.int32),
    )


@torch.library.register_fake("moetrain::route_backward")
def _route_backward_fake(dweight_N: Tensor, dprob_sum_GE: Tensor, logits_TE: Tensor, *options: Any) -> Tensor:
    return logits_TE.new_empty(logits_TE.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits_TE, _, score, _, num_null, _, _, _, renormalise, scale, valid_T, segment_T, num_segments = inputs
    token_N, _, offset_E1, expert_id_TK, place_TK, _, count_GE, bad_1 = output
    ctx.mark_non_differentiable(token_N, offset_E1, expert_id_TK, place_TK, count_GE, bad_1)
    ctx.save_for_backward(logits_TE, expert_id_TK, place_TK, valid_T, segment_T)
    ctx.options = (score, num_null, renormalise, scale)
    ctx.num_segments = num_segments
    ctx.set_materialize_grads(False)  # else zeros are made for the six outputs that have no gradient


def _route_backward(
    ctx: Any, _dtoken: None, dweight_N: Tensor | None, _doffset: None, _did: None, _dplace: None,
    dprob_sum_GE: Tensor | None, _dcount: None, _dbad: None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    logits_TE, expert_id_TK, place_TK, valid_T, segment_T = ctx.saved_tensors
    dtype = torch.promote_types(logits_TE.dtype, torch.float32)
    if dweight_N is None:
        dweight_N = logits_TE.new_zeros(place_TK.numel(), dtype=dtype)
    if dprob_sum_GE is None:
        dprob_sum_GE = logits_TE.new_zeros(ctx.num_segments, logits_TE.shape[1], dtype=dtype)
    dlogits_TE = OPS.route_backward(
        dweight_N, dprob_sum_GE, logits_TE, expert_id_TK, place_TK, *ctx.options, valid_T, segment_T
    )
    return dlogits_TE, *(None,) * 12


torch.library.register_autograd("moetrain::route", _route_backward, setup_context=_save)
refuse_second_derivative("route")
