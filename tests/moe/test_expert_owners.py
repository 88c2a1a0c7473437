"""Experts whose parameters belong to somebody else's module: equal to the store and to the definition."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from moe import reference
from moe.dispatch.helpers import Mode, make_groups
from moe.helpers import WIDTH, context, make_moe, make_params, tokens
from ranks import run_on_ranks
from torch import Tensor, nn

from moetrain.config import MoELayerConfig
from moetrain.mesh.groups import MeshGroups
from moetrain.moe import BalanceState, ExpertWeightsProvider, LayerServices, MoELayer, make_dispatcher
from moetrain.placement.chunks import ExpertShape
from moetrain.placement.held import ExpertWeights
from moetrain.placement.placement import Placement
from moetrain.placement.sparse import SparseCollectives
from moetrain.placement.static import plan_static
from moetrain.placement.store import ExpertStore

LAYER, SIZES = 3, [5, 6]
Params = dict[str, Tensor]


class FusedExperts(nn.Module):
    """As transformers keeps experts: ``gate_up_proj`` [e, 2F, D] and ``down_proj`` [e, D, F], the leaves themselves."""

    def __init__(self, params: Params, held: tuple[int, ...]) -> None:
        super().__init__()
        self.held = held
        self.gate_up_proj = nn.Parameter(params["w_in"].detach()[list(held)].flatten(1, 2).clone())
        self.down_proj = nn.Parameter(params["w_out"].detach()[list(held)].clone())

    def materialise(self, layer: int, placement: Placement | None = None) -> ExpertWeights:
        assert layer == LAYER
        slot_E = torch.arange(len(self.held), dtype=torch.int32)
        w_in = self.gate_up_proj.unflatten(1, (2, -1))
        return ExpertWeights(w_in, self.down_proj, slot_E, self.held)

    def gradients(self) -> Params:
        assert self.gate_up_proj.grad is not None
        assert self.down_proj.grad is not None
        return {"w_in": self.gate_up_proj.grad.unflatten(1, (2, -1)), "w_out": self.down_proj.grad}


class SeparateExperts(nn.Module):
    """As Megatron's SequentialMLP keeps them: ``linear_fc1`` [2F, D] and ``linear_fc2`` [D, F] of each expert."""

    def __init__(self, params: Params, held: tuple[int, ...]) -> None:
        super().__init__()
        self.held = held
        self.fc1 = nn.ParameterList(params["w_in"].detach()[e].flatten(0, 1).clone() for e in held)
        self.fc2 = nn.ParameterList(params["w_out"].detach()[e].clone() for e in held)

    def materialise(self, layer: int, placement: Placement | None = None) -> ExpertWeights:
        assert layer == LAYER
        slot_E = torch.arange(len(self.held), dtype=torch.int32)
        w_in = torch.stack(list(self.fc1)).unflatten(1, (2, -1))
        return ExpertWeights(w_in, torch.stack(list(self.fc2)), slot_E, self.held)

    def gradients(self) -> Params:
        fc1, fc2 = ([p.grad for p in fc if p.grad is not None] for fc in (self.fc1, self.fc2))
        return {"w_in": torch.stack(fc1).unflatten(1, (2, -1)), "w_out": torch.stack(fc2)}


@dataclass
class Stored:
    """The ExpertStore, with what a test asks of it."""

    store: ExpertStore
    held: tuple[int, ...]

    def materialise(self, layer: int, placement: Placement | None = None) -> ExpertWeights:
        return self.store.materialise(layer)

    def gradients(self) -> Params:
        self.store.reduce_gradients()
        grads = {layer: owned.grad for layer, owned in self.store.owned_parameters().items() if owned.grad is not None}
        flat = self.store.full_expert(LAYER, grads)
        split = [self.store.shape.split(flat[e]) for e in self.held]
        return {name: torch.stack([both[at] for both in split]) for at, name in enumerate(("w_in", "w_out"))}


def stored(config: MoELayerConfig, params: Params, groups: MeshGroups, held: tuple[int, ...]) -> Stored:
    store = ExpertStore(
        ExpertShape(width=WIDTH, hidden=config.moe.expert_width, gated=config.moe.gated),
        {LAYER: plan_static(groups.mesh, config.moe.num_experts)},
        SparseCollectives(groups.group("sparse"), groups.group_rank("sparse")),
        groups.pool_rank,
        compute_dtype=torch.float64,
        master_dtype=torch.float64,
        device="cpu",
    )
    flat_EN = torch.cat([params[name].detach().flatten(1) for name in ("w_in", "w_out")], dim=1)
    store.initialise(lambda _, expert, index_N: flat_EN[expert][index_N])
    return Stored(store, held)


def run_layer(
    config: MoELayerConfig, params: Params, groups: MeshGroups, experts: Any, x_TD: Tensor, pull_TD: Tensor
) -> Params:
    """Output, its gradient by tokens, and by the router's and experts' weights."""
    provider: ExpertWeightsProvider = experts
    balance = BalanceState([LAYER], config, dtype=torch.float64)
    dispatcher = make_dispatcher(plan_static(groups.mesh, config.moe.num_experts), groups)
    layer = MoELayer(WIDTH, config, LAYER, LayerServices(provider, dispatcher, balance[LAYER])).double()
    with torch.no_grad():
        layer.router.weight.copy_(params["router"])
    x_TD = x_TD.clone().requires_grad_()
    y_TD, aux = layer(x_TD, context(len(x_TD), step=sum(SIZES)))
    ((y_TD * pull_TD).sum() + aux).backward()
    assert x_TD.grad is not None
    assert layer.router.weight.grad is not None
    router_ED = layer.router.weight.grad.clone()
    dist.all_reduce(router_ED)
    return {"y": y_TD.detach(), "dx": x_TD.grad, "router": router_ED, **experts.gradients()}


def owners_body(rank: int, spoil: float) -> dict[str, dict[str, float]]:
    """Errors of each owner against the definition, all tokens in one place, and of the others against the store."""
    config = make_moe(activation="swiglu")
    params = make_params(config)
    world = dist.get_world_size()
    sizes = SIZES if world == 2 else [sum(SIZES)]
    groups = make_groups(Mode())
    try:
        held = plan_static(groups.mesh, config.moe.num_experts).experts_of(rank)
        here = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        x_TD = tokens(sum(SIZES))
        pull_TD = torch.linspace(-1, 2, x_TD.numel(), dtype=torch.float64).view_as(x_TD)
        fused, separate = FusedExperts(params, held), SeparateExperts(params, held)
        with torch.no_grad():
            fused.down_proj[-1] *= spoil
        owners = {"store": stored(config, params, groups, held), "fused": fused, "separate": separate}
        found = {
            name: run_layer(config, params, groups, owner, x_TD.detach()[here], pull_TD[here])
            for name, owner in owners.items()
        }
        share_E = torch.full((6,), 1 / 6, dtype=torch.float64)
        valid = [True] * len(x_TD)
        y_TD, aux, _ = reference.layer(x_TD, params, config, valid=valid, num_step_tokens=len(x_TD), share_E=share_E)
        ((y_TD * pull_TD).sum() + aux).backward()
        assert x_TD.grad is not None
        want: dict[str, Any] = {"y": y_TD.detach()[here], "dx": x_TD.grad[here], "router": params["router"].grad}
        want |= {name: params[name].grad[list(held)] for name in ("w_in", "w_out")}  # type: ignore[index]
        errors = {owner: errors_of(mine, want) for owner, mine in found.items()}
        return errors | {
            f"{owner} and store": errors_of(found[owner], found["store"]) for owner in ("fused", "separate")
        }
    finally:
        groups.close()


def errors_of(mine: Params, want: Params) -> dict[str, float]:
    return {name: float((mine[name] - value).abs().max() / value.abs().max()) for name, value in want.items()}


@pytest.mark.dist
@pytest.mark.parametrize("world", [1, 2])
def test_whoever_owns_the_experts_the_layer_is_the_same(world: int) -> None:
    for found in run_on_ranks(world, owners_body, 1.0):
        for owner, errors in found.items():
            assert max(errors.values()) <= (0.0 if "against" in owner else 1e-11), owner


@pytest.mark.dist
def test_another_weight_would_show() -> None:
    for found in run_on_ranks(2, owners_body, 1.001):
        assert max(found["fused"].values()) > 1e-5
        assert max(found["separate"].values()) <= 1e-11
