"""Activations that wait on the host between forward and backward pass (ByteScale, arXiv 2502.21231, section 5.1).

Of each tensor that autograd saves, the first rows are copied to the host and let go on the device; they come back one
layer ahead of their use. Copies move bits, so that nothing else changes. Parameters, and weights of experts, stay: they
are known by their storages. What several operators save is moved once.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from moetrain.sequence.host_copies import Copying, HostCopies

LEAST_BYTES = 4096  # of a tensor, below which a copy costs more than it frees


@dataclass(slots=True)
class OffloadCounts:
    """What was offloaded since somebody looked."""

    num_bytes: int = 0  # that waited on the host
    waited_s: float = 0.0  # for bytes that were not back in time, as the host sees it


class Offload:
    """Offloads what autograd saves inside ``share``. One forward pass at a time; backward passes may come later."""

    def __init__(
        self,
        model: nn.Module,
        layers: list[nn.Module],
        copies: HostCopies,
        stays: Callable[[Tensor], bool] = lambda _: False,
    ) -> None:
        """Watch a model's layers, from outside.

        Args:
            model: whose parameters stay.
            layers: in the order in which they run; saved tensors come back one of them ahead.
            copies: to the host and back.
            stays: of other tensors, whether they must not be moved.
        """
        self.counts = OffloadCounts()
        self._copies, self._stays = copies, stays
        self._layer, self._is_behind = -1, False
        self._parameters: set[int] = set()
        self._kept: dict[tuple[object, ...], _Kept] = {}
        self._storages: list[StorageWeakRef] = []
        self._of_layers: dict[int, list[ReferenceType[_Kept]]] = {}  # the graph owns them
        model.register_forward_pre_hook(lambda module, _: self._enter(module, -1))
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda module, _, index=index: self._enter(module, index))
        if layers:
            layers[-1].register_forward_hook(lambda *_: self._leave())

    @contextmanager
    def share(self, ratio: float) -> Iterator[None]:
        """Meanwhile, let this share of the rows of what is saved wait on the host."""
        if ratio == 0:
            yield
            return
        self._of_layers = {}
        try:
            with saved_tensors_hooks(lambda x: self._pack(x, ratio), self._unpack):
                yield
        finally:
            self._kept, self._storages, self._layer = {}, [], -1
            self._parameters = set()

    def taken_counts(self) -> OffloadCounts:
        """What was counted since the last call."""
        found, self.counts = self.counts, OffloadCounts()
        return found

    def _enter(self, module: nn.Module, layer: int) -> None:
        """A layer begins: its parameters, which FSDP may have gathered a moment ago, are known."""
        self._layer, self._is_behind = layer, False
        self._parameters |= {_storage_of(parameter) for parameter in module.parameters() if _is_plain(parameter)}

    def _leave(self) -> None:
        """The layers are done: what is saved from here on is used at once, when the backward pass begins."""
        self._is_behind = True

    def _pack(self, x: Tensor, ratio: float) -> "Tensor | _Kept":
        num_rows = math.ceil(ratio * x.shape[0]) if x.dim() else 0
        if num_rows == 0 or self._is_behind or not self._moves(x):
            return x
        key = (_storage_of(x), x.storage_offset(), x.shape, x.stride(), x.dtype, x._version)
        if key not in self._kept:
            # As long as it is referred to, no other storage has its address.
            self._storages.append(StorageWeakRef(x.untyped_storage()))
            kept = self._kept[key] = _Kept(self, x.detach(), num_rows, self._layer)
            self._of_layers.setdefault(self._layer, []).append(ref(kept))
            kept.siblings = self._of_layers
            self.counts.num_bytes += kept.num_bytes
        return self._kept[key]

    def _moves(self, x: Tensor) -> bool:
        return (
            _is_plain(x)
            and x.is_floating_point()
            and x.nbytes >= LEAST_BYTES
            and all(stride > 0 or size == 1 for stride, size in zip(x.stride(), x.shape, strict=True))
            and not isinstance(x, nn.Parameter)
            and _storage_of(x) not in self._parameters
            and not self._stays(x)
        )

    def _unpack(self, kept: "Tensor | _Kept") -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        begun = time.perf_counter()
        found = kept.take()
        self.counts.waited_s += time.perf_counter() - begun
        return found

    def start(self, target: Tensor, source: Tensor) -> Copying:
        """Begin a copy."""
        return self._copies.start(target, source)

    def wait_for(self, copying: Copying) -> None:
        """Until a copy is done."""
        copying.wait()

    def host_like(self, source: Tensor) -> Tensor:
        """Memory on the host."""
        return self._copies.host_like(source)


class _Kept:
    """A saved tensor, of which the first rows wait on the host."""

    def __init__(self, offload: Offload, x: Tensor, num_rows: int, layer: int) -> None:
        self.layer = layer
        self.siblings: dict[int, list[ReferenceType[_Kept]]] = {}
        self._offload = offload
        self._shape, self._stride, self._num_rows = x.shape, x.stride(), num_rows
        self._dtype, self._device = x.dtype, x.device
        head = x[:num_rows]
        self._host = offload.host_like(head)
        self.num_bytes = head.nbytes
        self._out = offload.start(self._host, head)
        self._tail = x[num_rows:].clone() if num_rows < x.shape[0] else None  # not a view, which would hold all of it
        self._whole: Tensor | None = None
        self._back: Copying | None = None

    def begin_return(self) -> None:
        """Start to copy back, unless that is under way or done."""
        if self._whole is not None:
            return
        self._offload.wait_for(self._out)
        self._whole = torch.empty_strided(self._shape, self._stride, dtype=self._dtype, device=self._device)
        self._back = self._offload.start(self._whole[: self._num_rows], self._host)
        if self._tail is not None:
            self._whole[self._num_rows :].copy_(self._tail)
            self._tail = None

    def take(self) -> Tensor:
        """The whole tensor; those of the layer before begin to come back."""
        self.begin_return()
        for other in self.siblings.get(self.layer - 1, []) if self.layer > 0 else []:
            if (kept := other()) is not None:
                kept.begin_return()
        assert self._whole is not None
        if self._back is not None:
            self._offload.wait_for(self._back)
            self._back = None
        return self._whole


def _is_plain(x: Tensor) -> bool:
    """Whether it is memory of its own on one device: no DTensor, no tensor of a tracer."""
    return type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided and x.device.type in ("cpu", "cuda")


def _storage_of(x: Tensor) -> int:
    return x.untyped_storage()._cdata
