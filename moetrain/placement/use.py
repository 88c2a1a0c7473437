"""One micro-batch's use of a layer's experts: what is gathered and reduced when, tied to the residual path.

Every rank runs the residual path, forward and backward, whatever tokens and experts it has: so each rank starts the
same collectives in the same order. Three identities on that path say when:

    x ── begin ── attention ── before_experts ── MoE ── after_experts ──>
    forward   gather starts                               weights are given back, if they are not kept
    backward  gradients are awaited   gradients start     weights are gathered again, if they were given back
              <── attention's backward pass ──            <── the experts' backward pass ──

While attention's backward pass runs, gradients are under way, and so are the weights of the layer before.
Shapes: T tokens, D width.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from moetrain.placement.held import ExpertWeights, HeldExperts
from moetrain.placement.placement import Placement


class UseSteps(Protocol):
    """What a use asks of the store. Each is a step of all ranks of the pool, in the same order."""

    def start(self, layer: int, held: HeldExperts) -> None:
        """Gather the weights, unless they are here."""

    def forward_begun(self, use: "WeightUse") -> None:
        """The layer is about to run, or to run again."""

    def forward_done(self, use: "WeightUse") -> None:
        """The experts have run for the first time."""

    def experts_differentiated(self, use: "WeightUse") -> None:
        """All gradients of this use have been added."""

    def finish(self, use: "WeightUse") -> None:
        """The backward pass has left the layer."""


class WeightUse:
    """The experts of one layer in one micro-batch, from before attention to the end of the backward pass there.

    Made once per layer and micro-batch; a recomputation uses it again.
    """

    def __init__(self, steps: UseSteps, layer: int, held: HeldExperts, placement: Placement, *, repacks: bool) -> None:
        """Prepare.

        Args:
            steps: the store.
            layer: index of the layer.
            held: the experts that this rank holds.
            placement: under which the micro-batch runs: it has these holders.
            repacks: what the experts save for their backward pass is a note where weights are to be found then, not
                the weights, so that these can be given back.
        """
        self.layer = layer
        self.held = held
        self.placement = placement  # whose holders have the weights
        self.counted = False  # among the held experts' uses
        self._steps = steps
        self._repacks = repacks
        self._has_run = False

    def begin(self, x_TD: Tensor) -> Tensor:
        """``x_TD``, and start to gather; before attention, or wherever there is time until ``weights``."""
        self._steps.forward_begun(self)
        return _marked(x_TD, lambda: self._steps.finish(self))

    def before_experts(self, x_TD: Tensor) -> Tensor:
        """``x_TD``, from which the experts' input and the residual both come."""
        return _marked(x_TD, lambda: self._steps.experts_differentiated(self))

    def weights(self) -> ExpertWeights:
        """The weights; gradients for them come to the held experts."""
        found = self.held.weights()
        if not torch.is_grad_enabled():
            return found
        anchor = torch.empty(0, device=found.w_in.device, requires_grad=True)
        w_in, w_out = _Weights.apply(anchor, found.w_in, found.w_out, self.held.add_gradient)
        return ExpertWeights(w_in, w_out, found.slot_E, found.experts)

    def move(self, held: HeldExperts, placement: Placement) -> None:
        """Go on under another placement, before anything was computed with the weights of this one."""
        self.held, self.placement = held, placement

    def run(self, experts: Callable[[], Tensor]) -> Tensor:
        """What ``experts`` compute with the weights. Every rank runs them, also without rows and without experts.

        In the backward pass all ranks wait here for weights that were gathered again, whether they need any or not: a
        rank may have to pass some on.
        """
        with self._saving():
            y_RD = experts()
        return _marked(y_RD, self.held.wait) if self._repacks else y_RD

    def _saving(self) -> AbstractContextManager[Any]:
        if not (self._repacks and torch.is_grad_enabled()):
            return nullcontext()
        found = self.held.weights()
        pointers = {found.w_in.data_ptr(): "w_in", found.w_out.data_ptr(): "w_out"}
        shapes = {"w_in": found.w_in.shape, "w_out": found.w_out.shape}

        def pack(saved: Tensor) -> Tensor | str:
            name = pointers.get(saved.data_ptr()) if saved.numel() else None
            return name if name is not None and saved.shape == shapes[name] else saved

        def unpack(packed: Tensor | str) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            again: Tensor = getattr(self.held.weights(), packed)
            return again

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def after_experts(self, x_TD: Tensor) -> Tensor:
        """``x_TD``: what the experts give, about to join the residual path."""
        if not self._has_run:  # weights of a recomputation are used again at once
            self._has_run = True
            self._steps.forward_done(self)
        return _marked(x_TD, lambda: self._steps.start(self.layer, self.held))


def _marked(x_TD: Tensor, backward: Callable[[], None]) -> Tensor:
    """``x_TD``; ``backward`` is called when its gradient comes by."""
    if not (torch.is_grad_enabled() and x_TD.requires_grad):
        return x_TD
    marked: Tensor = _Marked.apply(x_TD, backward)
    return marked


class _Marked(torch.autograd.Function):
    """An identity that tells when its backward pass runs."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, backward: Callable[[], None]) -> Tensor:
        ctx.call = backward
        return x_TD.view_as(x_TD)

    @staticmethod
    def backward(ctx: Any, dx_TD: Tensor) -> tuple[Tensor, None]:
        ctx.call()
        return dx_TD, None


class _Weights(torch.autograd.Function):
    """Weights that are no leaves, so that no graph keeps their memory: gradients go to a callback."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, w_in: Tensor, w_out: Tensor, add: Callable[[Tensor | None, Tensor | None], None]
    ) -> tuple[Tensor, Tensor]:
        ctx.add = add
        ctx.set_materialize_grads(False)
        return w_in.view_as(w_in), w_out.view_as(w_out)

    @staticmethod
    def backward(ctx: Any, dw_in: Tensor | None, dw_out: Tensor | None) -> tuple[None, None, None, None]:
        ctx.add(dw_in, dw_out)
        return None, None, None, None
