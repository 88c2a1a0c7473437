"""Small layers with known weights for the tests of this folder."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from layer_configs import layer_config
from torch import Tensor

from moetrain.config import MoELayerConfig
from moetrain.moe import (
    BalanceState,
    Capacity,
    Dispatcher,
    LayerServices,
    LocalDispatcher,
    MoEContext,
    MoELayer,
    Rounding,
    Router,
    Routing,
    RoutingRule,
    TokenChoice,
)
from moetrain.placement.held import ExpertWeights
from moetrain.placement.placement import Placement

WIDTH = 6


@dataclass
class FixedStore:
    """Stands where an ExpertStore stands, with weights that the test made."""

    weights: ExpertWeights

    def materialise(self, layer: int, placement: Placement | None = None) -> ExpertWeights:
        return self.weights


def make_moe(**changes: object) -> MoELayerConfig:
    base: dict[str, object] = {"num_experts": 6, "top_k": 2, "expert_width": 5, "balance_coef": 0.3, "z_loss_coef": 0.2}
    return layer_config(**(base | changes))


def make_params(config: MoELayerConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    halves = 2 if config.moe.gated else 1
    shapes = {
        "router": (config.moe.num_experts, WIDTH),
        "w_in": (config.moe.num_experts, halves, config.moe.expert_width, WIDTH),
        "w_out": (config.moe.num_experts, WIDTH, config.moe.expert_width),
    }
    if config.moe.shared_hidden:
        shapes["shared.w_in"] = (halves, config.moe.shared_hidden, WIDTH)
        shapes["shared.w_out"] = (WIDTH, config.moe.shared_hidden)
        if config.moe.shared_gate:
            shapes["shared.gate"] = (1, WIDTH)
    return {
        name: torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def expert_weights(params: dict[str, Tensor], experts: tuple[int, ...] | None = None) -> ExpertWeights:
    """Weights of some experts as leaves; slots lie in reverse order, so that the map matters."""
    held = tuple(range(len(params["w_in"]))) if experts is None else experts
    backwards = list(reversed(held))
    return ExpertWeights(
        w_in=params["w_in"].detach()[backwards].clone().requires_grad_(),
        w_out=params["w_out"].detach()[backwards].clone().requires_grad_(),
        slot_E=torch.arange(len(held) - 1, -1, -1, dtype=torch.int32),
        experts=held,
    )


def make_router(config: MoELayerConfig, weight_ED: Tensor) -> Router:
    router = Router(config.moe.num_experts, WIDTH, TokenChoice(config.moe.top_k, config.router)).to(weight_ED.dtype)
    with torch.no_grad():
        router.weight.copy_(weight_ED)
    return router


def make_layer(
    config: MoELayerConfig,
    params: dict[str, Tensor],
    *,
    dispatcher: Dispatcher | None = None,
    experts: tuple[int, ...] | None = None,
    balance: BalanceState | None = None,
) -> tuple[MoELayer, ExpertWeights, BalanceState]:
    balance = balance or BalanceState([3], config, dtype=params["router"].dtype)
    weights = expert_weights(params, experts)
    rounding = config.dispatch.rounding
    rules: list[RoutingRule] = [] if rounding == "none" else [Rounding(rounding, config)]
    if config.dispatch.capacity_factor is not None:
        rules.append(Capacity(config))
    services = LayerServices(
        FixedStore(weights), dispatcher or LocalDispatcher(config.moe.num_experts), balance[3], tuple(rules)
    )
    layer = MoELayer(WIDTH, config, 3, services)
    layer.to(params["router"].dtype)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(params["router" if name == "router.weight" else name])
    return layer, weights, balance


def context(
    num_tokens: int, *, valid: list[bool] | None = None, step: int | None = None, **changes: bool
) -> MoEContext:
    gid_T2 = torch.stack((torch.zeros(num_tokens, dtype=torch.int64), torch.arange(num_tokens)), dim=1)
    flags = torch.tensor([True] * num_tokens if valid is None else valid, dtype=torch.bool)
    return MoEContext(flags, gid_T2, num_tokens if step is None else step, changes.get("training", True))


def tokens(num_tokens: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(num_tokens, WIDTH, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()


def gradients(layer: MoELayer, weights: ExpertWeights) -> dict[str, Tensor]:
    """Gradients under the reference's names, experts ascending."""
    slot = weights.slot_E.long()
    found = {"router" if name == "router.weight" else name: p.grad for name, p in layer.named_parameters()}
    for name, tensor in (("w_in", weights.w_in), ("w_out", weights.w_out)):
        found[name] = None if tensor.grad is None else tensor.grad[slot]
    return {name: torch.zeros(()) if grad is None else grad for name, grad in found.items()}


def relative_error(mine: Tensor, reference: Tensor) -> float:
    """max|a - b| / max|b|, 0 where both are empty or zero."""
    assert mine.shape == reference.shape, (mine.shape, reference.shape)
    if mine.numel() == 0:
        return 0.0
    mine, reference = mine.detach().double(), reference.detach().double()
    error = float((mine - reference).abs().max())
    return error / max(float(reference.abs().max()), 1e-300) if error else 0.0


def integer_routing(num_tokens: int, num_experts: int, top_k: int, seed: int) -> Routing:
    """Random distinct experts per token with small whole weights."""
    rng = torch.Generator().manual_seed(seed)
    choice_TE = torch.rand(num_tokens, num_experts, generator=rng).argsort(dim=1)
    pairs = sorted((int(e), t) for t in range(num_tokens) for e in choice_TE[t, :top_k])
    expert_N = torch.tensor([e for e, _ in pairs], dtype=torch.int64)
    offset_E1 = torch.zeros(num_experts + 1, dtype=torch.int32)
    offset_E1[1:] = torch.bincount(expert_N, minlength=num_experts).cumsum(0)
    return Routing(
        token_N=torch.tensor([t for _, t in pairs], dtype=torch.int32),
        weight_N=torch.randint(-2, 4, (len(pairs),), generator=rng).float().requires_grad_(),
        offset_E1=offset_E1,
        token_gid_T2=torch.zeros(num_tokens, 2, dtype=torch.int64),
        num_tokens=num_tokens,
    )


def rank_routing(routing: Routing, here: slice) -> Routing:
    """The pairs of one rank's tokens."""
    offsets = routing.offset_E1.tolist()
    keep = [[n for n in range(a, b) if here.start <= int(routing.token_N[n]) < here.stop] for a, b in spans(offsets)]
    pair_N = torch.tensor([n for part in keep for n in part], dtype=torch.int64)
    ends = torch.tensor([0, *(len(part) for part in keep)]).cumsum(0)
    return Routing(
        token_N=routing.token_N[pair_N] - here.start,
        weight_N=routing.weight_N.detach()[pair_N].requires_grad_(),
        offset_E1=ends.int(),
        token_gid_T2=routing.token_gid_T2[here],
        num_tokens=here.stop - here.start,
    )


def spans(offsets: list[int]) -> list[tuple[int, int]]:
    return list(pairwise(offsets))


def choices_of(routing: Routing) -> list[list[int]]:
    choices: list[list[int]] = [[] for _ in range(routing.num_tokens)]
    for e, (start, stop) in enumerate(spans(routing.offset_E1.tolist())):
        for token in routing.token_N[start:stop].tolist():
            choices[token].append(e)
    return choices
