"""Which layouts of a number of ranks are legal, and which of them is most like one that is not."""

import math
from itertools import islice
from typing import Any

from moetrain.mesh.folded_mesh import FoldedMesh

NUM_HEADS = EXPERT_WIDTH = 24  # of the scaled-down model; what tp and etp have to divide


def nearest_layouts(ranks: int, wanted: dict[str, int], count: int = 3, *, nodes_of: int | None = None) -> list[str]:
    """Legal layouts of ``ranks`` ranks, the ones most like ``wanted`` first, as command-line options.

    With ``nodes_of`` ranks on each node, only layouts that dispatch in two levels takes.
    """
    divisors = [size for size in range(1, ranks + 1) if ranks % size == 0]
    layouts = [
        {"dp_replicate": replicas, "dp_shard": shards, "tp": ranks // (replicas * shards), **experts}
        for replicas in divisors
        for shards in divisors
        if ranks % (replicas * shards) == 0 and NUM_HEADS % (ranks // (replicas * shards)) == 0
        for ep in divisors
        for etp in divisors
        if ranks % (ep * etp) == 0 and EXPERT_WIDTH % etp == 0
        for experts in ({"ep": ep, "etp": etp, "edp": ranks // (ep * etp)},)
    ]

    def distance(layout: dict[str, int]) -> float:
        return sum(
            abs(math.log(size / wanted.get(axis, 1 if axis in ("dp_replicate", "tp", "etp") else size)))
            for axis, size in layout.items()
        )

    def has_two_levels(layout: dict[str, int]) -> bool:
        sizes: dict[str, Any] = {**layout, "ranks_per_node": nodes_of}
        return nodes_of is None or FoldedMesh(**sizes).has_equal_nodes

    return [_options(layout) for layout in islice(filter(has_two_levels, sorted(layouts, key=distance)), count)]


def _options(layout: dict[str, int]) -> str:
    attention = [f"{name}={layout[axis]}" for name, axis in (("dp_replicate",) * 2, ("tp",) * 2) if layout[axis] > 1]
    attention.insert(len(attention) - (layout["tp"] > 1), f"dp={layout['dp_shard']}")
    experts = [f"{axis}={layout[axis]}" for axis in ("ep", "edp", "etp") if axis != "etp" or layout[axis] > 1]
    return f"--mesh {','.join(attention)} --experts {','.join(experts)}"
