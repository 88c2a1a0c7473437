"""Which layers' experts may stay gathered between forward and backward pass: as many as memory has room for."""

import os

import torch
import torch.distributed as dist

from moetrain.mesh.groups import MeshGroups
from moetrain.placement.store import ExpertStore

PART = 0.5  # of what is free before the first step: activations need the rest


def layers_that_fit(store: ExpertStore, most_held: int, groups: MeshGroups) -> tuple[int, ...]:
    """The last layers, which the backward pass needs first, up to a part of the memory of the rank with the least.

    Collective over the pool: all its ranks keep the same layers.

    Args:
        store: of the experts.
        most_held: experts of a layer that a rank can come to hold.
        groups: this rank's process groups.
    """
    ranks_here = min(groups.size("world"), groups.mesh.ranks_per_node)
    room = torch.tensor([free_bytes(store.device, ranks_here)], dtype=torch.int64, device=store.device)
    dist.all_reduce(room, op=dist.ReduceOp.MIN, group=groups.group("pool"))
    left, kept = int(PART * int(room)), []
    for layer in reversed(store.layers):
        left -= most_held * store.layout(layer).expert_elems * store.compute_dtype.itemsize
        if left < 0:
            break
        kept.append(layer)
    return tuple(sorted(kept))


def free_bytes(device: torch.device, ranks_here: int) -> int:
    """Memory that is free on a device, or of a host a rank's share, which ``ranks_here`` share."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks_here
