"""What one rank has of every tensor, compared where it lies with the same elements of the oracle's whole tensors.

Nothing is gathered: each rank answers for its own elements, so replicas that drift apart are noticed, and a case costs
little more than its steps. That no element is without a rank is checked once per engine.

Shapes: N elements that a rank has of one tensor.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.train.engine import Engine
from moetrain.train.shards import Shard, zeros_if_none


@dataclass(frozen=True, slots=True)
class HeldShard:
    """This rank's shard of the tensor ``name``: a box of it, or for experts a list of elements.

    Attributes:
        name: as in ``WholeTensors.parameters``.
        shard: what has the values.
        region: the box; None for experts.
        mine_N: int64, elements of the flattened shard; None for dense parameters.
        whole_N: int64, the same elements in the flattened whole tensor.
    """

    name: str
    shard: Shard
    region: tuple[slice, ...] | None = None
    mine_N: Tensor | None = None
    whole_N: Tensor | None = None

    def parameter(self) -> Tensor:
        """The values of the shard's elements."""
        return self._pick(self.shard.local())

    def gradient(self) -> Tensor:
        """The gradient as the optimizer saw it."""
        return self._pick(zeros_if_none(self.shard.value.grad, self.shard.value.detach()))

    def of_whole(self, whole: Tensor) -> Tensor:
        """The shard's elements of a whole tensor; shares memory where the shard is a box."""
        return whole[self.region] if self.region is not None else whole.flatten()[self.whole_N]

    def mark(self, whole: Tensor) -> None:
        """Write ones where the shard lies."""
        if self.region is not None:
            whole[self.region] = 1
        else:
            whole.view(-1)[self.whole_N] = 1

    def _pick(self, local: Tensor) -> Tensor:
        return local if self.mine_N is None else local.flatten()[self.mine_N]


def held_shards(engine: Engine) -> list[HeldShard]:
    """Everything this rank has a shard of, in an order that is the same on every rank."""
    dense = [HeldShard(shard.name, shard, shard.region(shard.local())) for shard in engine.dense]
    return dense + [held for shard in engine.experts for held in _expert_shards(engine, shard)]


def _expert_shards(engine: Engine, shard: Shard) -> list[HeldShard]:
    """The elements of both of a layer's stacked tensors among the chunks that this rank owns."""
    layer = shard.expert_layer
    assert layer is not None
    store, split, length = engine.store, engine.expert_shape.w_in_numel, shard.shape[1]
    sizes = {"w_in": split, "w_out": engine.expert_shape.num_parameters - split}
    mine: dict[str, list[Tensor]] = {name: [torch.empty(0, dtype=torch.int64)] for name in sizes}
    whole: dict[str, list[Tensor]] = {name: [torch.empty(0, dtype=torch.int64)] for name in sizes}
    for chunk in store.owned_chunks(layer):
        index_N = store.indices(layer, chunk, chunk.start, chunk.stop)
        place_N = chunk.row * length + torch.arange(len(index_N))
        for name, is_its_N, first in (("w_in", index_N < split, 0), ("w_out", index_N >= split, split)):
            mine[name].append(place_N[is_its_N])
            whole[name].append(chunk.expert * sizes[name] + index_N[is_its_N] - first)
    return [
        HeldShard(f"{shard.name}.{name}", shard, mine_N=torch.cat(mine[name]), whole_N=torch.cat(whole[name]))
        for name in sizes
    ]


def lost_names(shards: Sequence[HeldShard], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Tensors of which some element is on no rank, or that only one side knows. Collective over all ranks."""
    names = sorted(shapes)
    marks = {name: torch.zeros(tuple(shapes[name]), dtype=torch.uint8) for name in names}
    for shard in shards:
        if shard.name in marks:
            shard.mark(marks[shard.name])
    flat = torch.cat([marks[name].flatten() for name in names])
    dist.all_reduce(flat, op=dist.ReduceOp.MAX)
    found = flat.split([marks[name].numel() for name in names])
    lost = [name for name, mark in zip(names, found, strict=True) if not bool(mark.all())]
    return lost + sorted({shard.name for shard in shards} - set(names))


def errors_of_shards(
    shards: Sequence[HeldShard],
    values: Callable[[HeldShard], Tensor],
    expected: Mapping[str, Tensor],
    scales: Mapping[str, float],
) -> dict[str, float]:
    """The relative error of every tensor among this rank's elements: largest difference / scale.

    Args:
        shards: what this rank has, all of it named in ``expected``.
        values: gives a shard's values.
        expected: whole tensors by name.
        scales: by name; see ``errors.scales_of``.
    """
    return {
        shard.name: _error(values(shard), shard.of_whole(expected[shard.name]), scales[shard.name]) for shard in shards
    }


def _error(actual: Tensor, expected: Tensor, scale: float) -> float:
    if actual.shape != expected.shape:
        return math.inf
    if actual.numel() == 0:
        return 0.0
    difference = float((actual.double() - expected.double()).abs().max())
    if difference == 0.0:
        return 0.0
    return difference / scale if difference < math.inf and scale > 0 else math.inf  # NaN is not below infinity
