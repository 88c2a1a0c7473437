"""What the dense gradients of one step cost on the wire, which FSDP moves without telling."""

from collections.abc import Iterable

import torch

from moetrain.mesh.groups import MeshGroups
from moetrain.mesh.traffic import TrafficCounter
from moetrain.train.shards import Shard

PURPOSE = "dense_grad"


def count_dense_gradients(
    counter: TrafficCounter, shards: Iterable[Shard], groups: MeshGroups, compute: torch.dtype
) -> None:
    """Count what this rank sends to reduce the gradients of ``shards`` once, by ring algorithms.

    A reduce-scatter over W ranks sends W - 1 times what the rank keeps; an all-reduce of n bytes over R ranks sends
    2 (R - 1) n / R. Gradients travel in at least float32. What a parameter's padding adds is not counted.

    Args:
        counter: Where the bytes are added, as "dense_grad".
        shards: Dense ones of this rank.
        groups: Its groups: sharded over "shard", replicated over "dp_replicate" and, unless cut, over "tp".
        compute: Type of compute.
    """
    itemsize = torch.promote_types(compute, torch.float32).itemsize
    sharded, replicas, tp = (groups.size(name) for name in ("shard", "dp_replicate", "tp"))
    total = 0
    for shard in shards:
        kept = shard.value.numel() * itemsize
        total += (sharded - 1) * kept + 2 * (replicas - 1) * kept // replicas
        if shard.cut is None:
            total += 2 * (tp - 1) * kept // tp
    if total:
        counter.add(PURPOSE, 0, total)
