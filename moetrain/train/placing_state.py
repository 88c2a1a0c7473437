"""What a checkpoint keeps of where experts were: owners, loads, costs, the number of plans. Replicas are never kept.

Under the same layout of the pool a run goes on with the very plan that it had. Under another one experts are spread
evenly again, and of the loads totals over all nodes remain.
Shapes: L MoE layers, E experts, N nodes of the pool.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moetrain.checkpoint import Manifest
from moetrain.checkpoint.shards import LogicalTensor
from moetrain.cost.step_costs import StepCosts
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.train.placing import Placing, pool_layout

KEY = "placement"  # in a checkpoint's JSON
LOADS = "placement.loads"  # tensors of a checkpoint: .0 is the oldest


def placing_json(placing: Placing) -> dict[str, Any]:
    """Plain values; nothing where experts never move."""
    if not placing.config.moves:
        return {}
    kept = {
        "layout": pool_layout(placing.mesh),
        "layers": list(placing.placed),
        "owners": placing.owners().tolist(),
        "num_plans": placing.num_plans,
        "error": placing.error,
        "costs": placing.measured_costs(),
    }
    return {KEY: kept}


def loads_to_save(placing: Placing) -> dict[str, LogicalTensor]:
    """The loads seen, float32 [L, N, E] each; the same on all ranks, so that one of them saves them."""
    if not placing.config.moves:
        return {}
    seen = placing.predictor.state_dict()["seen"]
    return {f"{LOADS}.{index}": LogicalTensor.whole(count_LNE) for index, count_LNE in enumerate(seen)}


def owners_to_restore(placing: Placing, extra: Mapping[str, Any]) -> Tensor | None:
    """int32 [L, E]: the owners of a checkpoint's experts; None where they stay as they are.

    That is: nothing moves here, nothing moved there, or the pool is laid out otherwise.
    """
    kept = extra.get(KEY)
    if kept is None or not placing.config.moves or kept["layout"] != pool_layout(placing.mesh):
        return None
    if kept["layers"] != list(placing.placed):
        return None
    owner_LE = torch.tensor(kept["owners"], dtype=torch.int32)
    return None if torch.equal(owner_LE, placing.owners()) or _too_uneven(kept, placing.most_owned) else owner_LE


def _too_uneven(kept: Mapping[str, Any], most_owned: int | None) -> bool:
    """Whether a group owns more experts of a layer than messages have room for."""
    if most_owned is None:
        return False
    return max(max(Counter(owners).values()) for owners in kept["owners"]) > most_owned


def loads_to_load(placing: Placing, manifest: Manifest) -> dict[str, LogicalTensor]:
    """Empty tensors for the loads that a checkpoint has."""
    if not placing.config.moves or KEY not in manifest.extra:
        return {}
    names = sorted((name for name in manifest.tensors if name.startswith(f"{LOADS}.")), key=_index_of)
    shapes = [manifest.tensors[name].shape for name in names]
    num_layers, _, num_experts = placing.predictor.shape
    if any((shape[0], shape[2]) != (num_layers, num_experts) for shape in shapes):
        return {}
    return {name: LogicalTensor.whole(torch.zeros(shape)) for name, shape in zip(names, shapes, strict=True)}


def restore_placing(placing: Placing, extra: Mapping[str, Any], loads: Mapping[str, LogicalTensor]) -> None:
    """Take the loads over that were loaded, and plan as before; owners have been restored already."""
    kept = extra.get(KEY)
    if kept is None or not placing.config.moves:
        return
    seen = [tensor.shards[0].tensor for _, tensor in sorted(loads.items(), key=lambda item: _index_of(item[0]))]
    placing.predictor.load_state_dict({"seen": seen, "error": kept["error"]})
    placing.num_plans, placing.error = kept["num_plans"], kept["error"]
    if kept.get("costs") and kept["layout"] == pool_layout(placing.mesh):  # the very plans, not better ones
        placing.use_costs(StepCosts.from_dict(kept["costs"]))
    if (plan := placing.plan_again()) is not None:
        placing.take(plan)


def what_is_lost(extra: Mapping[str, Any], mesh: FoldedMesh, most_owned: int | None) -> str | None:
    """What a checkpoint's owners and loads lose here; None where nothing is lost.

    Args:
        extra: the checkpoint's JSON.
        mesh: where ranks stand now.
        most_owned: experts of a layer that a group may own; None for any number.
    """
    kept = extra.get(KEY)
    if kept is None:
        return None
    if kept["layout"] == pool_layout(mesh):
        return _UNEVEN if _too_uneven(kept, most_owned) else None
    return (
        f"with {_in_words(pool_layout(mesh))}, the checkpoint with {_in_words(kept['layout'])}: experts are spread "
        "evenly again, and plans start from loads over all nodes together"
    )


_UNEVEN = (
    "a rank owned more experts of a layer than padded messages have room for now that owners stay: experts are spread "
    "evenly again; set placement.move_owners_every, or dispatch.pad_to_capacity to false, to keep them where they were"
)


def _in_words(layout: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in layout.items())


def _index_of(name: str) -> int:
    return int(name.rpartition(".")[2])
