"""Cross-entropy of a linear head without its logits.

Shapes: T tokens, D width, V vocabulary (this rank's part of it under tensor parallelism), C tokens of a chunk.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from moetrain.mesh.tensor_parallel import Cut, TensorParallel

_LOGITS_PER_CHUNK = 1 << 24  # 64 MiB of float32


def linear_cross_entropy_sum(
    x_TD: Tensor,
    w_VD: Tensor,
    target_T: Tensor,
    chunk: int | None = None,
    *,
    tp: TensorParallel | None = None,
    rows: Cut | None = None,
) -> Tensor:
    """Sum of -log softmax(x @ w.T)[target] over the tokens that have a target.

    Logits exist for one chunk of tokens at a time, in the forward pass, where the gradients are made as well; the
    backward pass only scales them. Sums run in at least fp32.

    Args:
        x_TD: activations, the same on all ranks of ``tp``; T may be 0.
        w_VD: the head, of the same type.
        target_T: int64 class of each token; negative where there is no loss.
        chunk: tokens per chunk; by default as many as make 16 M logits.
        tp: ranks that have a part of the head each; two small all-reduces per chunk join them. Every rank's gradient
            of ``x_TD`` is then its part's alone, to be summed over ranks.
        rows: which rows of the head ``w_VD`` is; all of them where left out.

    Returns:
        A scalar of at least float32, the same on all ranks of ``tp``.

    Raises:
        ValueError: shapes or types do not fit together, or ``chunk`` is below 1.
    """
    _check(x_TD, w_VD, target_T, chunk)
    # The same on all ranks, whose parts of the head may differ by a row.
    num_rows = w_VD.shape[0] if rows is None or tp is None else -(-rows.total // tp.size)
    size = chunk or max(1, _LOGITS_PER_CHUNK // max(1, num_rows))
    head = _Head(tp or TensorParallel(), 0 if rows is None else rows.start)
    loss_sum: Tensor = _LinearCrossEntropySum.apply(x_TD, w_VD, target_T, size, torch.is_grad_enabled(), head)
    return loss_sum


@dataclass(frozen=True, slots=True, eq=False)
class _Head:
    """Which classes this rank has: V from ``start`` on."""

    tp: TensorParallel
    start: int

    def loss_sum(self, logits_CV: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor]:
        """The chunk's summed loss, and softmax(logits) of the classes here."""
        if self.tp.size == 1:
            loss = functional.cross_entropy(logits_CV, target_C.clamp(min=-1), ignore_index=-1, reduction="sum")
            return loss, logits_CV
        most_C = self.tp.all_reduce(logits_CV.amax(dim=1), dist.ReduceOp.MAX)
        logits_CV = logits_CV - most_C[:, None]
        is_here_C, class_C = self.own_classes(target_C, logits_CV.shape[1])
        chosen_C = logits_CV.gather(1, class_C[:, None]).squeeze(1) * is_here_C
        total_C, chosen_C = self.tp.all_reduce(torch.stack((logits_CV.exp().sum(dim=1), chosen_C)))
        log_total_C = total_C.log()
        return ((log_total_C - chosen_C) * (target_C >= 0)).sum(), logits_CV - log_total_C[:, None]

    def own_classes(self, target_C: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Whether each token's target is among the ``count`` classes here, and which of them it is (else any)."""
        class_C = target_C - self.start
        is_here_C = (target_C >= 0) & (class_C >= 0) & (class_C < count)
        return is_here_C, class_C.clamp(0, count - 1)

    def logit_gradient(self, logits_CV: Tensor, target_C: Tensor) -> Tensor:
        """softmax(logits) minus one at the target, of what ``loss_sum`` gave; zero rows where there is no target."""
        grad_CV = logits_CV.softmax(dim=-1) if self.tp.size == 1 else logits_CV.exp()
        has_loss_C = target_C >= 0
        is_here_C, class_C = self.own_classes(target_C, logits_CV.shape[1])
        grad_CV.scatter_add_(1, class_C[:, None], -is_here_C.to(grad_CV.dtype)[:, None])
        return grad_CV * has_loss_C.to(grad_CV.dtype)[:, None]


class _LinearCrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, w_VD: Tensor, target_T: Tensor, chunk: int, training: bool, head: _Head
    ) -> Tensor:
        at_least_fp32 = torch.promote_types(x_TD.dtype, torch.float32)
        # Without gradients needs_input_grad still says what the inputs are, not what will be asked for.
        needs_x, needs_w = (training and needs for needs in ctx.needs_input_grad[:2])
        loss_sum = torch.zeros((), dtype=at_least_fp32, device=x_TD.device)
        grad_x_TD = torch.empty_like(x_TD) if needs_x else None
        grad_w_VD = torch.zeros_like(w_VD, dtype=at_least_fp32) if needs_w else None
        for start in range(0, x_TD.shape[0], chunk):
            x_CD, target_C = x_TD[start : start + chunk], target_T[start : start + chunk]
            logits_CV = functional.linear(x_CD, w_VD).to(at_least_fp32)
            chunk_sum, logits_CV = head.loss_sum(logits_CV, target_C)
            loss_sum += chunk_sum
            if grad_x_TD is None and grad_w_VD is None:
                continue
            grad_CV = head.logit_gradient(logits_CV, target_C).to(x_TD.dtype)
            if grad_x_TD is not None:
                torch.mm(grad_CV, w_VD, out=grad_x_TD[start : start + chunk])
            if grad_w_VD is not None:
                grad_w_VD += grad_CV.T @ x_CD
        ctx.save_for_backward(*(grad for grad in (grad_x_TD, grad_w_VD) if grad is not None))
        ctx.w_dtype = w_VD.dtype
        return loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        needs_x, needs_w = ctx.needs_input_grad[:2]
        made = list(ctx.saved_tensors)
        grad_x_TD = made.pop(0) if needs_x else None
        grad_w_VD = made.pop(0) if needs_w else None
        return (
            None if grad_x_TD is None else grad_x_TD * grad_sum,
            None if grad_w_VD is None else (grad_w_VD * grad_sum).to(ctx.w_dtype),
            None,
            None,
            None,
            None,
        )


def _check(x_TD: Tensor, w_VD: Tensor, target_T: Tensor, chunk: int | None) -> None:
    if x_TD.dim() != 2 or w_VD.dim() != 2 or x_TD.shape[1] != w_VD.shape[1]:
        raise ValueError(
            f"linear_cross_entropy_sum: x_TD and w_VD must be [T, D] and [V, D], "
            f"got {list(x_TD.shape)} and {list(w_VD.shape)}; flatten rows and tokens into T"
        )
    if x_TD.dtype != w_VD.dtype:
        raise ValueError(
            f"linear_cross_entropy_sum: x_TD and w_VD must have one type, got {x_TD.dtype} and {w_VD.dtype}; "
            "cast one of them"
        )
    if target_T.shape != x_TD.shape[:1] or target_T.dtype != torch.int64:
        raise ValueError(
            f"linear_cross_entropy_sum: target_T must be int64 [{x_TD.shape[0]}], "
            f"got {target_T.dtype} {list(target_T.shape)}"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"linear_cross_entropy_sum: chunk must be at least 1, got {chunk}; leave it out for a default")
