"""Initial values: a function of the seed, a parameter's name and an element's global index, and of nothing else.

So a rank fills its own shard alone, and the whole is the same on any number of ranks. Matrices are normal with
``model.init_std``; projections back into the residual stream are smaller by sqrt(2 * layers), as in GPT-2.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from moetrain.config import ModelConfig
from moetrain.mesh.tensor_parallel import Cut, uncut
from moetrain.models import names
from moetrain.ops.counter_random import counter_normal, key_of
from moetrain.placement.chunks import ExpertShape

_BLOCK = 1 << 22  # elements made at a time, to bound the memory that indices take


def initial_values(config: ModelConfig, name: str, start: int, stop: int, seed: int) -> Tensor:
    """float32 values of the elements [start, stop) of the flattened whole parameter called ``name``.

    Normals are made in float64 and rounded once, so that libraries' last bits do not show.

    Raises:
        ValueError: the range is not ascending from at least 0.
    """
    if not 0 <= start <= stop:
        raise ValueError(f"initial_values: {name} needs 0 <= start <= stop, got {start} and {stop}")
    return _values_of(config, name, [(start, stop)], seed)


def _values_of(config: ModelConfig, name: str, ranges: Sequence[tuple[int, int]], seed: int) -> Tensor:
    """Those of several ranges, one after another: many short ones cost little more than a long one."""
    size = sum(stop - start for start, stop in ranges)
    if names.is_norm(name):
        return torch.ones(size)
    if names.is_bias(name):
        return torch.zeros(size)
    value_N, done = torch.empty(size), 0
    for index_N in _blocks(ranges):
        value_N[done : done + len(index_N)] = _normals(config, name, index_N, seed)
        done += len(index_N)
    return value_N


def _blocks(ranges: Iterable[tuple[int, int]]) -> Iterator[Tensor]:
    """The numbers of all ranges in order, int64, in tensors of at most ``_BLOCK``."""
    held: list[Tensor] = []
    size = 0
    for start, stop in ranges:
        for first in range(start, stop, _BLOCK):
            count = min(_BLOCK, stop - first)
            if size + count > _BLOCK:
                yield torch.cat(held)
                held, size = [], 0
            held.append(torch.arange(first, first + count))
            size += count
    if held:
        yield torch.cat(held)


def _normals(config: ModelConfig, name: str, index_N: Tensor, seed: int) -> Tensor:
    """float64 values of elements of the matrix called ``name``."""
    std = config.init_std / (math.sqrt(2 * config.num_layers) if names.is_output_projection(name) else 1.0)
    return (std * counter_normal(key_of(seed, name), index_N, dtype=torch.float64)).float()


def expert_values(config: ModelConfig, shape: ExpertShape, seed: int) -> Callable[[int, int, Tensor], Tensor]:
    """Values for ``ExpertStore.initialise``: (layer, expert, places in one expert's flat logical vector).

    They are those of ``layers.{l}.moe.experts.w_in`` [E, 2 or 1, F, D] and ``.w_out`` [E, D, F], whole.
    """
    in_size, out_size = math.prod(shape.w_in_shape), math.prod(shape.w_out_shape)

    def values(layer: int, expert: int, index_N: Tensor) -> Tensor:
        value_N = torch.empty(len(index_N))
        is_in_N = index_N < in_size
        for name, is_its_N, base in (
            (names.stacked(layer, "w_in"), is_in_N, expert * in_size),
            (names.stacked(layer, "w_out"), ~is_in_N, expert * out_size - in_size),
        ):
            value_N[is_its_N] = _normals(config, name, base + index_N[is_its_N], seed)
        return value_N

    return values


@torch.no_grad()
def fill_parameters(model: nn.Module, config: ModelConfig, seed: int, cuts: Mapping[str, Cut]) -> None:
    """Give every parameter of ``model`` its initial values, each rank its own shards. Not collective.

    Args:
        model: the network.
        config: what it was made of.
        seed: of the run.
        cuts: by name, which part of a parameter the model here has; all of it where there is no entry.
    """
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        if isinstance(parameter, DTensor):
            local = parameter.to_local()
            local_shape, offset = compute_local_shape_and_global_offset(
                shape, parameter.device_mesh, parameter.placements
            )
        else:
            local, local_shape, offset = parameter.detach(), shape, (0,) * len(shape)
        whole, offset = uncut(shape, offset, cuts.get(name))
        if ranges := list(flat_ranges(whole, local_shape, offset)):
            local.copy_(_values_of(config, name, ranges, seed).view(tuple(local_shape)))


def flat_ranges(shape: Sequence[int], part: Sequence[int], offset: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of the flattened whole that make up a box of it, in the box's own order.

    Args:
        shape: of the whole.
        part: of the box; no range at all where it is empty.
        offset: of the box's first element.
    """
    if math.prod(part) == 0:
        return
    # Dimensions behind the last cut one are whole, so a range covers them and the cut dimension at once.
    cut = max((dim for dim in range(len(shape)) if part[dim] != shape[dim]), default=0)
    inner = math.prod(shape[cut + 1 :])
    for prefix in _prefixes(part[:cut]):
        row = 0
        for dim, place in enumerate(prefix):
            row = row * shape[dim] + offset[dim] + place
        start = (row * shape[cut] + offset[cut]) * inner
        yield start, start + part[cut] * inner


def _prefixes(sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
    if not sizes:
        yield ()
        return
    for head in _prefixes(sizes[:-1]):
        for last in range(sizes[-1]):
            yield (*head, last)
