"""The rules that a configuration asks for."""

import torch

from moetrain.config import MoELayerConfig
from moetrain.mesh.groups import MeshGroups
from moetrain.mesh.traffic import TrafficCounter
from moetrain.moe.rules.capacity import Capacity
from moetrain.moe.rules.contract import RoutingRule
from moetrain.moe.rules.rounding import make_rounding
from moetrain.placement.placement import Placement


def make_rules(
    config: MoELayerConfig,
    placement: Placement | None,
    groups: MeshGroups,
    counter: TrafficCounter | None = None,
    *,
    device: torch.device | str = "cpu",
) -> tuple[RoutingRule, ...]:
    """The rules of a layer whose experts are placed like this, in the order in which they are applied.

    Args:
        config: of the layer.
        placement: of its experts, if it stays; None where it moves.
        groups: this rank's process groups.
        counter: counts what rules send.
        device: of the routings.
    """
    rules: list[RoutingRule] = []
    if (rounding := make_rounding(config, placement, groups, counter, device=device)) is not None:
        rules.append(rounding)
    if config.dispatch.capacity_factor is not None:
        rules.append(Capacity(config))
    return tuple(rules)
