"""Copies between a device and the host that are under way while something else computes."""

import random
from typing import Protocol

import torch
from torch import Tensor

MOST_PENDING = 32  # copies that are late at a time


class Copying(Protocol):
    """A copy under way."""

    def wait(self) -> None:
        """Until its target may be read, by what is enqueued from here on, and its source may be written."""


class HostCopies(Protocol):
    """Starts copies, in either direction."""

    def start(self, target: Tensor, source: Tensor) -> Copying:
        """Begin; both must live, unwritten, until ``wait``, which comes before any other copy of the target."""

    def host_like(self, source: Tensor) -> Tensor:
        """Contiguous memory of the host for a copy of ``source``."""


class CudaCopies:
    """On two streams of their own, one for each direction; memory of the host is pinned."""

    def __init__(self, device: torch.device) -> None:
        """``device``: a GPU."""
        self._out, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def host_like(self, source: Tensor) -> Tensor:
        """See ``HostCopies``; torch keeps pinned memory that is given back."""
        return torch.empty(source.shape, dtype=source.dtype, pin_memory=True)

    def start(self, target: Tensor, source: Tensor) -> Copying:
        """See ``HostCopies``."""
        stream = self._out if source.is_cuda else self._back
        current = torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
            done = stream.record_event()
        # The allocator must not lend the device's side to others before the stream is done with it.
        (source if source.is_cuda else target).record_stream(stream)
        return _CudaCopying(done)


class _CudaCopying:
    def __init__(self, done: torch.cuda.Event) -> None:
        self._done = done

    def wait(self) -> None:
        torch.cuda.current_stream().wait_event(self._done)


class LateCopies:
    """For CPUs, where there is nothing to hide behind: copies as late and in as odd an order as a device might.

    What nobody has waited for is NaN.
    """

    def __init__(self, seed: int = 0) -> None:
        """``seed``: of the order."""
        self._random = random.Random(seed)
        self._pending: list[_LateCopying] = []

    def host_like(self, source: Tensor) -> Tensor:
        """See ``HostCopies``."""
        return torch.empty(source.shape, dtype=source.dtype)

    def start(self, target: Tensor, source: Tensor) -> Copying:
        """See ``HostCopies``."""
        target.fill_(torch.nan)
        copying = _LateCopying(self, target, source)
        self._pending.append(copying)
        if len(self._pending) > MOST_PENDING:  # a device gets on too
            self.finish(self._random.choice(self._pending))
        return copying

    def finish(self, wanted: "_LateCopying") -> None:
        """Do some of the others, then this one."""
        self._random.shuffle(self._pending)
        some = self._random.randint(0, len(self._pending))
        for copying in [*self._pending[:some], wanted]:
            copying.do()
        self._pending = [copying for copying in self._pending if not copying.is_done]


class _LateCopying:
    def __init__(self, copies: LateCopies, target: Tensor, source: Tensor) -> None:
        self.is_done = False
        self._copies, self._target, self._source = copies, target, source

    def do(self) -> None:
        """Copy, and let both go."""
        if not self.is_done:
            self._target.copy_(self._source)
            self.is_done = True
            del self._target, self._source

    def wait(self) -> None:
        if not self.is_done:
            self._copies.finish(self)


def host_copies(device: torch.device) -> HostCopies:
    """The copies of a device."""
    return CudaCopies(device) if device.type == "cuda" else LateCopies()
