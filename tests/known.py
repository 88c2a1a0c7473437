"""What a test knows to be there and a type checker does not."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def grad_of(leaf: Tensor) -> Tensor:
    """The gradient that a backward pass left."""
    assert leaf.grad is not None
    return leaf.grad


def sum_of(parts: Iterable[Tensor]) -> Tensor:
    """Their sum, as ``sum`` would take it; there is at least one."""
    first, *others = parts
    total = torch.zeros_like(first) + first
    for other in others:
        total = total + other
    return total


def world_group() -> ProcessGroup:
    """The default process group."""
    assert dist.group.WORLD is not None
    return dist.group.WORLD
