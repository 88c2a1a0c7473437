"""The expert MLPs, routed and shared. Shapes: R rows, D width, F hidden width, N pairs, e experts held here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

from moetrain.config.moe import Activation
from moetrain.mesh.tensor_parallel import Cut, TensorParallel
from moetrain.ops import expert_mlp
from moetrain.ops.activation import activate
from moetrain.placement.held import ExpertWeights
from moetrain.placement.placement import Placement


class ExpertWeightsProvider(Protocol):
    """Whoever has the routed experts' parameters: the ``ExpertStore``, or the model of another framework.

    A MoE layer asks it for nothing else, unless it is a ``WeightStream``. Summing gradients over the ranks that hold
    the same experts, the optimizer and checkpoints are the provider's own business.
    """

    def materialise(self, layer: int, placement: Placement | None) -> ExpertWeights:
        """The weights of the experts of ``layer`` that this rank computes with: those it holds in ``placement``.

        That is the dispatcher's, for this micro-batch; None where it has no say because all experts are local. Called
        once per forward pass of a layer, and once more where it is recomputed, on every rank of the pool, which may
        exchange weights in it. The tensors may be leaves or results of operations on them: the backward pass adds up in
        the leaves' ``.grad``, or wherever the leaves' hooks put it.
        """


class LayerUse(Protocol):
    """A layer's weights in one micro-batch: ``placement.use.WeightUse`` says what happens when."""

    @property
    def placement(self) -> Placement | None:
        """Under which the micro-batch runs."""

    def begin(self, x_TD: Tensor) -> Tensor:
        """Before attention, or as early as there is something to compute; the same values."""

    def before_experts(self, x_TD: Tensor) -> Tensor:
        """Before the experts' input leaves the residual path; the same values."""

    def weights(self) -> ExpertWeights:
        """The weights, now."""

    def run(self, experts: Callable[[], Tensor]) -> Tensor:
        """What ``experts`` compute with the weights."""

    def after_experts(self, x_TD: Tensor) -> Tensor:
        """For the experts' output, before it joins the residual path; the same values."""


@runtime_checkable
class WeightStream(Protocol):
    """A provider whose weights come and go: the ``ExpertStore``."""

    def use(self, layer: int, placement: Placement | None = None, *, recomputes: bool = False) -> LayerUse:
        """The experts of ``layer`` for one micro-batch; with ``recomputes`` the layer is run again with it."""

    def replan(self, use: Any, placement: Placement) -> None:
        """Go on under ``placement`` in a use that has begun."""


@dataclass(frozen=True, slots=True, eq=False)
class WeightsAtHand:
    """The use of weights that a provider has at any time."""

    materialise: Callable[[], ExpertWeights]
    placement: Placement | None

    def begin(self, x_TD: Tensor) -> Tensor:
        """``x_TD``."""
        return x_TD

    def before_experts(self, x_TD: Tensor) -> Tensor:
        """``x_TD``."""
        return x_TD

    def weights(self) -> ExpertWeights:
        """What the provider gives."""
        return self.materialise()

    def run(self, experts: Callable[[], Tensor]) -> Tensor:
        """What they compute."""
        return experts()

    def after_experts(self, x_TD: Tensor) -> Tensor:
        """``x_TD``."""
        return x_TD


def use_experts(
    provider: ExpertWeightsProvider | WeightStream, layer: int, placement: Placement | None, *, recomputes: bool
) -> LayerUse:
    """One micro-batch's use of a layer's experts, whoever has them."""
    if isinstance(provider, WeightStream):
        return provider.use(layer, placement, recomputes=recomputes)
    return WeightsAtHand(lambda: provider.materialise(layer, placement), placement)


def run_experts(
    x_RD: Tensor,
    row_N: Tensor,
    weight_N: Tensor,
    offset_e1: Tensor,
    weights: ExpertWeights,
    activation: Activation,
    recompute_hidden: bool = False,
) -> Tensor:
    """y[r] = sum over r's pairs, experts ascending, of weight * (activate(x[r] @ w_in.T) @ w_out.T).

    The backward pass keeps x and the pre-activations of each pair; see ``expert_mlp`` for the bytes.

    Args:
        x_RD: rows.
        row_N: int32, the row of each pair; pairs are grouped by expert, what lies beyond ``offset_e1[-1]`` is ignored.
        weight_N: at least float32.
        offset_e1: int32, over the experts held here, ascending.
        weights: slots may have any stride; ``slot_E`` maps experts to slots.
        activation: of the hidden layer.
        recompute_hidden: keep x alone and compute the pre-activations again.

    Returns:
        [R, D]; a row without pairs is zero.
    """
    return expert_mlp(
        x_RD,
        row_N,
        weight_N,
        offset_e1,
        weights.w_in,
        weights.w_out,
        slot_E=weights.slot_E,
        activation=activation,
        recompute_h=recompute_hidden,
    )


class SharedExpert(nn.Module):
    """One MLP that every token passes through, with an optional sigmoid gate (Qwen2-MoE).

    ``w_in`` [2 or 1, F, D], ``w_out`` [D, F] and ``gate`` [1, D] are zero until the model fills them. A rank of a tp
    group has its part of F, and between layers t of the T tokens.
    """

    def __init__(
        self, width: int, hidden: int, activation: Activation, *, gate: bool, tp: TensorParallel | None = None
    ) -> None:
        """``hidden`` is F of the whole, at least the ranks of ``tp``."""
        super().__init__()
        self.tp = tp or TensorParallel()
        self._hidden = self.tp.cut(1, hidden)
        self.activation: Activation = activation
        self.w_in = nn.Parameter(torch.zeros(2 if activation == "swiglu" else 1, self._hidden.size, width))
        self.w_out = nn.Parameter(torch.zeros(width, self._hidden.size))
        self.gate = nn.Parameter(torch.zeros(1, width)) if gate else None

    def cuts(self) -> dict[str, Cut]:
        """The parameters of which this rank has a part."""
        return {"w_in": self._hidden, "w_out": self._hidden}

    def forward(self, x_tD: Tensor, num_tokens: int | None = None) -> Tensor:
        """[t, D] -> [t, D], of ``num_tokens`` tokens that the tp group has together (t on one rank)."""
        x_TD = self.tp.gather(x_tD, x_tD.shape[0] if num_tokens is None else num_tokens)
        h_TF = activate(functional.linear(x_TD, self.w_in.flatten(0, 1)), self.activation)
        y_tD = self.tp.scatter_sum(functional.linear(h_TF, self.w_out))
        if self.gate is None:
            return y_tD
        at_least_fp32 = torch.promote_types(x_tD.dtype, torch.float32)
        gate_t1 = functional.linear(x_tD.to(at_least_fp32), self.gate.to(at_least_fp32)).sigmoid()
        return (y_tD * gate_t1).to(x_tD.dtype)
