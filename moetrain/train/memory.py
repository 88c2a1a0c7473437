"""Which layers' experts may stay gathered between forward and backward pass: as many as memory has room for."""

import os

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from moetrain.placement.store import ExpertStore

PART = 0.5  # of what is free before the first step: activations need the rest


def layers_that_fit(store: ExpertStore, most_held: int, group: ProcessGroup) -> tuple[int, ...]:
    """The last layers, which the backward pass needs first, up to a part of the memory of the rank with the least.

    Collective over ``group``, the pool: all ranks keep the same layers.

    Args:
        store: of the experts.
        most_held: experts of a layer that a rank can come to hold.
        group: the pool.
    """
    room = torch.tensor([free_bytes(store.device)], dtype=torch.int64, device=store.device)
    dist.all_reduce(room, op=dist.ReduceOp.MIN, group=group)
    left, kept = int(PART * int(room)), []
    for layer in reversed(store.layers):
        left -= most_held * store.layout(layer).expert_elems * store.compute_dtype.itemsize
        if left < 0:
            break
        kept.append(layer)
    return tuple(sorted(kept))


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a device, or for this rank's share of a host."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // max(1, ranks_here)
