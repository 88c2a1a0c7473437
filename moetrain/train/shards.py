"""What one rank owns of every parameter, as plain tensors.

Optimizers are elementwise, so they step local shards and never need to know about meshes. Dense parameters are
DTensors that FSDP2 cut along one dimension, after tensor parallelism may have cut them; expert parameters are the
owned chunks of the ExpertStore.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moetrain.mesh.tensor_parallel import Cut, uncut
from moetrain.models import names
from moetrain.placement.store import ExpertStore


@dataclass(frozen=True, slots=True)
class Shard:
    """One parameter's part on this rank.

    ``source`` is the parameter itself, whose ``.grad`` the backward pass fills. ``value`` is what the optimizer steps:
    the same object, except for DTensors, where it shares memory with the local part. ``shape`` and ``offset`` place a
    dense shard in its whole tensor. ``cut`` says which part of the parameter this rank's tp coordinate has; None where
    every rank of a tp group has all of it, and its gradient is the sum of theirs.
    """

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    value: nn.Parameter
    source: nn.Parameter
    decay: bool
    expert_layer: int | None = None
    cut: Cut | None = None

    def local(self) -> Tensor:
        """The values this rank holds, in the parameter's memory."""
        return local_part(self.source.detach())

    def region(self, local: Tensor) -> tuple[slice, ...]:
        """Where ``local``, this rank's part, lies in the whole tensor."""
        return tuple(slice(start, start + size) for start, size in zip(self.offset, local.shape, strict=True))

    def fetch_gradient(self) -> None:
        """Point ``value`` and its gradient at the local parts (FSDP2 may have moved a parameter's memory)."""
        if self.value is not self.source:
            self.value.data = self.local()
            self.value.grad = None if self.source.grad is None else local_part(self.source.grad)

    def clear_gradient(self) -> None:
        """Forget the gradient of this step."""
        self.value.grad = None
        if self.expert_layer is None:
            self.source.grad = None


def decays(name: str, num_dims: int) -> bool:
    """Whether weight decay applies: to matrices (experts and routers too), not to norms, biases and embeddings."""
    return num_dims >= 2 and name != names.EMBEDDING


def local_part(tensor: Tensor) -> Tensor:
    """The plain tensor this rank holds of a DTensor, or the tensor itself; shares memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and global offset of the part of ``tensor`` that this rank holds."""
    if not isinstance(tensor, DTensor):
        return tuple(tensor.shape), (0,) * tensor.dim()
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(shape), tuple(offset)


def dense_shards(model: nn.Module, cuts: Mapping[str, Cut]) -> Iterator[Shard]:
    """Shards of the model's own parameters, in the model's order (the same on every rank)."""
    for raw_name, param in model.named_parameters():
        name = names.logical(raw_name)
        value = nn.Parameter(local_part(param.detach())) if isinstance(param, DTensor) else param
        shape, offset = uncut(param.shape, placed(param)[1], cuts.get(name))
        yield Shard(
            name=name,
            shape=shape,
            offset=offset,
            value=value,
            source=param,
            decay=decays(name, param.dim()),
            cut=cuts.get(name),
        )


def expert_shards(store: ExpertStore) -> Iterator[Shard]:
    """Owned chunks of the store, one stack [owned chunks, slice elements] per MoE layer, layers ascending."""
    for layer, param in sorted(store.owned_parameters().items()):
        yield Shard(
            name=names.experts_of(layer),
            shape=tuple(param.shape),
            offset=(0, 0),
            value=param,
            source=param,
            decay=True,
            expert_layer=layer,
        )


def zeros_if_none(gradient: Tensor | None, like: Tensor) -> Tensor:
    """A gradient that was never written is zero."""
    return torch.zeros_like(like) if gradient is None else gradient
