"""How much memory a call takes: at its peak, and what autograd keeps for the backward pass.

torch's CPU allocator counts nothing, but the profiler sees every allocation and release that goes through it; their
running sum is the number that ``torch.cuda.max_memory_allocated`` gives on a GPU. What a library allocates past torch
(thread-local buffers, MKL, oneDNN) shows in the growth of the process's resident memory, which Linux counts.
"""

import ctypes
import gc
import resource
import statistics
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

_MEMORY_EVENT = "[memory]"


@dataclass(frozen=True, slots=True)
class Saved:
    """Bytes that a forward pass keeps for the backward pass; weights of the model are not among them.

    Inputs that must be kept (x) count, whoever allocated them.
    """

    activation_bytes: int
    metadata_bytes: int  # indices and routing weights


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The most bytes that torch's allocator held at once during ``call`` beyond what it held before; results count."""
    if device.startswith("cuda"):
        return _peak_bytes_on_gpu(call)
    call()  # what is allocated once per process is not the call's
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        result = call()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in trace.profiler.kineto_results.events()
        if event.name() == _MEMORY_EVENT
    ]
    del result
    return running_peak(changes)


def running_peak(changes: Collection[tuple[int, int]]) -> int:
    """The highest running sum of (time, bytes) changes; never below 0."""
    now = peak = 0
    for _, num_bytes in sorted(changes, key=lambda change: change[0]):
        now += num_bytes
        peak = max(peak, now)
    return peak


def _peak_bytes_on_gpu(call: Callable[[], object]) -> int:
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


def peak_resident_bytes(call: Callable[[], object]) -> int | None:
    """Growth of the process's resident memory at the peak of ``call``; None where the system does not count it."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and reset.exists()):
        return None
    call()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else memory freed earlier would be used again unseen
    before = _status_bytes(status, "VmRSS")
    reset.write_text("5")  # the peak starts anew from here
    result = call()
    peak = _status_bytes(status, "VmHWM")
    del result
    return max(0, peak - before)


def _status_bytes(status: Path, field: str) -> int:
    line = next(line for line in status.read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) * 1024


def page_faults(call: Callable[[], object]) -> int:
    """Pages that the system maps during one ``call``: what an allocator costs that gives memory back at once.

    The median of some calls, since the allocator needs a few to come to rest.
    """
    counts = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        call()
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return int(statistics.median(counts[2:]))


def saved_bytes(run: Callable[[], Tensor], *, weights: Collection[Tensor], metadata: Collection[Tensor]) -> Saved:
    """What autograd keeps after ``run``, each piece of memory once.

    Args:
        run: the forward pass.
        weights: of the model; memory that they share is left out.
        metadata: memory that these share, and all saved integers, count as metadata.
    """
    kept: dict[int, tuple[int, bool]] = {}
    alive: list[Tensor] = []

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), not saved.is_floating_point())
        alive.append(saved)  # so that no address is used twice
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        result = run()
    of_weights = {weight.untyped_storage().data_ptr() for weight in weights}
    of_metadata = {tensor.untyped_storage().data_ptr() for tensor in metadata}
    activations = metadata_total = 0
    for address, (num_bytes, is_index) in kept.items():
        if address in of_weights:
            continue
        if is_index or address in of_metadata:
            metadata_total += num_bytes
        else:
            activations += num_bytes
    del result
    return Saved(activations, metadata_total)
