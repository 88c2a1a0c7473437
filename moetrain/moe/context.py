"""What a MoE layer is told about its micro-batch, and what it remembers for recomputation. Shapes: T tokens here."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import create_selective_checkpoint_contexts

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, eq=False)
class MoEContext:
    """One micro-batch as its MoE layers see it.

    Args:
        valid_T: bool, false for padding: routed nowhere, counted nowhere.
        token_gid_T2: int64 [T, 2], global id of each token: (sequence, position).
        num_step_tokens: valid tokens of the whole optimizer step, over all ranks and micro-batches; auxiliary losses
            are divided by it, so that they may be summed.
        training: false in evaluation: nothing is counted for balancing, and nothing is rounded.
        random_key: of (seed, step, round), equal on all ranks: what is random in this micro-batch derives from it.
        num_tokens: tokens that this rank's tp group has together; T where there is no tensor parallelism.
    """

    valid_T: Tensor
    token_gid_T2: Tensor
    num_step_tokens: int
    training: bool
    random_key: int = 0
    num_tokens: int | None = None


class RoutingMemo:
    """What one layer decided for one micro-batch, so that recomputation replays it.

    Pass a fresh memo per (layer, micro-batch) where activations are recomputed, and none elsewhere:

        memo = RoutingMemo()
        y_TD, aux = checkpoint(layer, x_TD, ctx, memo, use_reentrant=False, context_fn=checkpoint_contexts)

    The first forward makes each value, a recomputation finds it: splits, the exchange of counts and the statistics
    happen once. The routing is not remembered, because its weights carry gradient: ``saved_ops`` keeps what ``route``
    gave, pairs and all, so that recomputation differentiates through the very same choice.
    """

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def once(self, name: str, make: Callable[[], Value]) -> Value:
        """The value that ``make`` gave the first time."""
        if name not in self._values:
            self._values[name] = make()
        return cast(Value, self._values[name])


def once(memo: RoutingMemo | None, name: str, make: Callable[[], Value]) -> Value:
    """``memo.once``, or just ``make()`` where nothing is recomputed."""
    return make() if memo is None else memo.once(name, make)


def saved_ops() -> tuple[torch._ops.OpOverload, ...]:
    """Ops whose outputs activation checkpointing must save; everything discrete beside them is in the memo."""
    return (torch.ops.moetrain.route.default,)


class _ReplayOnly(TorchDispatchMode):
    """Leaves ``ops`` to a replaying mode and runs all else.

    Torch's mode refuses a recomputation that runs an op more often than the forward pass did. FSDP does that inside
    the region: what it profiles depends on whether it has to gather.
    """

    def __init__(self, replay: TorchDispatchMode, ops: tuple[torch._ops.OpOverload, ...]) -> None:
        super().__init__()
        self._replay = replay
        self._ops = ops

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._ops:
            return self._replay.__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def checkpoint_contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """``context_fn`` for ``torch.utils.checkpoint.checkpoint`` that saves what ``saved_ops`` names."""
    save, replay = create_selective_checkpoint_contexts(list(saved_ops()))
    return save, _ReplayOnly(replay, saved_ops())
