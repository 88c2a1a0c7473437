"""Ways to run the experts of a routed layer: moetrain's, and what can be had from torch alone.

Every competitor gets the pairs grouped by expert; grouping is not part of anybody's time unless its own code does it.
Shapes: T tokens, D width, F hidden width, E experts, K per token, N = T * K pairs, C rows of a padded expert.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal
from unittest import mock

import torch
from expert_layer import Competitor, Layer
from torch import Tensor
from torch.nn import functional

from moetrain.ops import expert_mlp, grouped_gemm, scatter_add_rows
from moetrain.ops.activation import activate
from moetrain.ops.cuda_path import VARIABLE, CudaPath


def ours(layer: Layer, *, recompute_h: bool = False) -> Competitor:
    """The fused op, which keeps the hidden rows for the backward pass or makes them anew."""

    def run() -> Tensor:
        pairs = layer.token_N, layer.weight_N, layer.offset_E1
        return expert_mlp(layer.x_TD, *pairs, layer.w_in_E2FD, layer.w_out_EDF, recompute_h=recompute_h)

    return Competitor("moetrain, h recomputed" if recompute_h else "moetrain", run, _leaves(layer))


@dataclass(frozen=True, slots=True, eq=False)
class OnPath(Competitor):
    """Ours, made to take one path of its CUDA kernels, which is read at each call, backward too."""

    path: str = "sm80"

    def forward_backward(self, dy_TD: Tensor) -> tuple[Tensor, ...]:
        with mock.patch.dict(os.environ, {VARIABLE: self.path}):
            return Competitor.forward_backward(self, dy_TD)

    def answers(self, dy_TD: Tensor) -> dict[str, Tensor]:
        with mock.patch.dict(os.environ, {VARIABLE: self.path}):
            return Competitor.answers(self, dy_TD)


def on_path(layer: Layer, path: CudaPath) -> Competitor:
    """The fused op on another path than it would choose.

    Raises:
        ValueError: the layer is on the CPU, where there is no such choice.
    """
    if not layer.x_TD.is_cuda:
        raise ValueError(f"the path {path} is one of CUDA, and the layer is on the CPU")
    run = ours(layer).run

    def run_on_path() -> Tensor:
        with mock.patch.dict(os.environ, {VARIABLE: path}):
            return run()

    return OnPath(f"moetrain, {path}", run_on_path, _leaves(layer), path=path)


def unfused(layer: Layer) -> Competitor:
    """Our grouped GEMMs with the gather fused in, and our deterministic scatter, but everything else apart."""

    def run() -> Tensor:
        h_NH = grouped_gemm(layer.x_TD, layer.w_in_E2FD.flatten(1, 2), layer.offset_E1, row_M=layer.token_N)
        y_ND = grouped_gemm(activate(h_NH, "swiglu"), layer.w_out_EDF, layer.offset_E1)
        return scatter_add_rows(y_ND, layer.token_N, layer.weight_N, layer.offset_E1, num_rows=layer.shape.T)

    return Competitor("moetrain, unfused", run, _leaves(layer))


def sorted_loop(layer: Layer) -> Competitor:
    """Expert by expert over sorted rows; ``unbind`` once, for ``w[e]`` makes a full-size gradient per expert."""
    token_N, ends = layer.token_N.long(), layer.offset_E1.tolist()
    counts = [stop - start for start, stop in pairwise(ends)]

    def run() -> Tensor:
        x_ND = layer.x_TD.index_select(0, token_N)
        weight_N1 = layer.weight_N.to(layer.x_TD.dtype)[:, None]
        w_ins, w_outs = layer.w_in_E2FD.flatten(1, 2).unbind(0), layer.w_out_EDF.unbind(0)
        parts = []
        for x_MD, w_in, w_out in zip(x_ND.split(counts), w_ins, w_outs, strict=True):
            parts.append(functional.linear(_swiglu(functional.linear(x_MD, w_in)), w_out))
        y_ND = torch.cat(parts) * weight_N1
        return torch.zeros_like(layer.x_TD).index_add(0, token_N, y_ND)

    return Competitor("torch sorted loop", run, _leaves(layer))


def padded_bmm(layer: Layer) -> Competitor:
    """Every expert padded to the rows of the fullest, then two batched products."""
    shape, offset_E1 = layer.shape, layer.offset_E1.long()
    expert_N = torch.repeat_interleave(torch.arange(shape.E, device=offset_E1.device), offset_E1.diff())
    place_N = torch.arange(shape.num_pairs, device=offset_E1.device) - offset_E1[expert_N]
    room = int(offset_E1.diff().max())
    slot_N, token_N = expert_N * room + place_N, layer.token_N.long()

    def run() -> Tensor:
        x_ND = layer.x_TD.index_select(0, token_N)
        padded_ECD = x_ND.new_zeros(shape.E * room, shape.D).index_copy(0, slot_N, x_ND).view(shape.E, room, shape.D)
        h_ECH = torch.bmm(padded_ECD, layer.w_in_E2FD.flatten(1, 2).transpose(1, 2))
        y_ECD = torch.bmm(_swiglu(h_ECH), layer.w_out_EDF.transpose(1, 2))
        y_ND = y_ECD.flatten(0, 1).index_select(0, slot_N) * layer.weight_N.to(x_ND.dtype)[:, None]
        return torch.zeros_like(layer.x_TD).index_add(0, token_N, y_ND)

    return Competitor("torch padded bmm", run, _leaves(layer))


@dataclass(frozen=True, slots=True)
class Pipeline:
    """One torch pipeline: gather, ``torch._grouped_mm``, SwiGLU, ``_grouped_mm``, weighted sum home.

    Attributes:
        gather: how tokens become rows; ``bag`` has an ``embedding_bag`` for its backward pass.
        weigh: where the routing weight is applied: rows of the hidden activation are narrower than outputs.
        home: ``index_add``; ``unsort``, which brings pairs back to their token's order and sums over K; ``bag``, an
            ``embedding_bag`` that does both at once (with a gather for its backward pass); ``weighted bag``, which
            torch itself differentiates.
    """

    gather: Literal["index_select", "index", "bag"]
    weigh: Literal["hidden", "output", "home"]
    home: Literal["index_add", "unsort", "bag", "weighted bag"]

    def __str__(self) -> str:
        return f"gather by {self.gather}, weight on {self.weigh}, home by {self.home}"


PIPELINES = (
    Pipeline("index_select", "output", "index_add"),
    Pipeline("index_select", "hidden", "index_add"),
    Pipeline("index", "hidden", "index_add"),
    Pipeline("index_select", "hidden", "unsort"),
    Pipeline("index_select", "hidden", "bag"),
    Pipeline("bag", "hidden", "bag"),
    Pipeline("index_select", "home", "weighted bag"),
)


def torch_pipeline(layer: Layer, kind: Pipeline) -> Competitor:
    """One of ``PIPELINES``."""
    gather, home = _gather(layer, kind), _home(layer, kind)
    end_E = layer.offset_E1[1:].contiguous()

    def run() -> Tensor:
        weight_N = layer.weight_N.to(layer.x_TD.dtype)
        x_ND = gather(layer.x_TD)
        a_NF = _swiglu(_grouped_mm(x_ND, layer.w_in_E2FD.flatten(1, 2).transpose(1, 2), end_E))
        if kind.weigh == "hidden":
            a_NF = a_NF * weight_N[:, None]
        y_ND = _grouped_mm(a_NF, layer.w_out_EDF.transpose(1, 2), end_E)
        if kind.weigh == "output":
            y_ND = y_ND * weight_N[:, None]
        return home(y_ND, weight_N)

    return Competitor("torch grouped_mm", run, _leaves(layer))


def compiled(pipeline: Competitor) -> Competitor:
    """``pipeline`` under ``torch.compile``; needs a C++ compiler at run time."""
    return Competitor(f"{pipeline.name}, compiled", torch.compile(pipeline.run), pipeline.leaves, pipeline.canonical)


def _gather(layer: Layer, kind: Pipeline) -> Callable[[Tensor], Tensor]:
    token_N = layer.token_N.long()
    if kind.gather == "index":
        return lambda x_TD: x_TD[token_N]
    if kind.gather == "index_select":
        return lambda x_TD: x_TD.index_select(0, token_N)
    place_TK = _places(layer)
    return lambda x_TD: _GatherRows.apply(x_TD, token_N, place_TK)


def _home(layer: Layer, kind: Pipeline) -> Callable[[Tensor, Tensor], Tensor]:
    token_N = layer.token_N.long()
    if kind.home == "index_add":
        return lambda y_ND, weight_N: torch.zeros_like(layer.x_TD).index_add(0, token_N, y_ND)
    place_TK = _places(layer)
    if kind.home == "unsort":
        return lambda y_ND, weight_N: y_ND.index_select(0, place_TK.flatten()).unflatten(0, place_TK.shape).sum(1)
    if kind.home == "bag":
        return lambda y_ND, weight_N: _SumRows.apply(y_ND, token_N, place_TK)

    def weighted_bag(y_ND: Tensor, weight_N: Tensor) -> Tensor:
        weight_TK = weight_N.index_select(0, place_TK.flatten()).view_as(place_TK)
        return functional.embedding_bag(place_TK, y_ND, mode="sum", per_sample_weights=weight_TK)

    return weighted_bag


class _GatherRows(torch.autograd.Function):
    """Rows of tokens; backward sums each token's rows in one pass."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_N: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK)
        return x_TD.index_select(0, token_N)

    @staticmethod
    def backward(ctx: Any, dx_ND: Tensor) -> tuple[Tensor, None, None]:
        (place_TK,) = ctx.saved_tensors
        return functional.embedding_bag(place_TK, dx_ND, mode="sum"), None, None


class _SumRows(torch.autograd.Function):
    """The sum of each token's K rows in one pass; backward is a gather."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, token_N: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(token_N)
        return functional.embedding_bag(place_TK, y_ND, mode="sum")

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, None, None]:
        (token_N,) = ctx.saved_tensors
        return dy_TD.index_select(0, token_N), None, None


def _places(layer: Layer) -> Tensor:
    """[T, K]: where in the grouped list each token's pairs are, the inverse of ``pair_N``."""
    pair_N = layer.pair_N.long()
    place_P = torch.empty_like(pair_N).index_copy_(0, pair_N, torch.arange(len(pair_N), device=pair_N.device))
    return place_P.view(-1, layer.shape.K)


def _grouped_mm(a_NK: Tensor, b_EKM: Tensor, end_E: Tensor) -> Tensor:
    return torch._grouped_mm(a_NK, b_EKM, offs=end_E)


def _swiglu(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _leaves(layer: Layer) -> tuple[Tensor, ...]:
    return layer.x_TD, layer.weight_N, layer.w_in_E2FD, layer.w_out_EDF
