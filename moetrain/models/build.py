"""From a run's configuration to a model on this rank: built without memory, sharded, then filled.

FSDP2 holds the dense parameters, the ``ExpertStore`` the experts. Gradients are sums over ranks, never means: losses
are divided once, by the step's global counts.
"""

from dataclasses import dataclass

import torch

from moetrain.config import RunConfig
from moetrain.mesh.groups import MeshGroups
from moetrain.mesh.tensor_parallel import TensorParallel
from moetrain.mesh.traffic import TrafficCounter
from moetrain.models.fsdp import shard_model
from moetrain.models.init import expert_values, fill_parameters
from moetrain.models.transformer import Transformer
from moetrain.moe.balance.state import BalanceState
from moetrain.moe.dispatch.all_to_all import make_dispatcher
from moetrain.moe.dispatch.contract import Dispatcher
from moetrain.moe.dispatch.padded import Padding
from moetrain.moe.layer import LayerServices, MoELayer
from moetrain.moe.rules.capacity import rows_within_capacity
from moetrain.moe.rules.contract import RoutingRule
from moetrain.moe.rules.make import make_rules
from moetrain.ops.native import multiplies_bf16
from moetrain.placement.chunks import ExpertShape
from moetrain.placement.placement import Placement
from moetrain.placement.sparse import SparseCollectives
from moetrain.placement.static import plan_static
from moetrain.placement.store import ExpertStore


@dataclass(frozen=True, slots=True, eq=False)
class BuiltModel:
    """A model that is ready to train, and what lives beside it.

    Attributes:
        model: the transformer under FSDP2; experts are not among its parameters.
        store: the experts.
        balance: counts and biases of all MoE layers.
        placements: where the experts of each MoE layer live.
        traffic: rows and bytes that this rank sent, by purpose.
    """

    model: Transformer
    store: ExpertStore
    balance: BalanceState
    placements: dict[int, Placement]
    traffic: TrafficCounter


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """Where a model is built.

    Attributes:
        run: the configuration; ``train.dtype`` is the type of compute, masters are at least float32.
        groups: this rank's process groups.
        device: where parameters live.
        traffic: counts what this rank sends.
    """

    run: RunConfig
    groups: MeshGroups
    device: torch.device
    traffic: TrafficCounter

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of compute on this device."""
        return compute_dtype(self.run, self.device)


def build_model(run: RunConfig, groups: MeshGroups, device: torch.device | str) -> BuiltModel:
    """Build, shard and fill the model that ``run`` describes. Every rank of the world calls it.

    Args:
        run: the configuration.
        groups: this rank's process groups.
        device: where parameters live.
    """
    site = Site(run, groups, torch.device(device), TrafficCounter(ranks_per_node=groups.mesh.ranks_per_node))
    placements = dict.fromkeys(run.model.moe_layers, plan_static(groups.mesh, run.moe.num_experts))
    store = _make_store(site, placements)
    balance = BalanceState(run.model.moe_layers, run.layer_config, device=device, dtype=site.compute_dtype)
    tp = tensor_parallel(groups, site.traffic)
    services = _layer_services(site, placements, store, balance, tp)
    with torch.device("meta"):
        model = Transformer(
            run.model,
            run.moe,
            lambda layer: MoELayer(run.model.width, run.layer_config, layer, services[layer]),
            run.train.activation_checkpoint,
            tp,
        ).to(store.master_dtype)
    shard_model(model, groups.dense_mesh(), site.compute_dtype, run.train.reshard_after_forward)
    model.to_empty(device=device)
    fill_parameters(model, run.model, run.seed, model.cuts())
    store.initialise(expert_values(run.model, store.shape, run.seed))
    return BuiltModel(model, store, balance, placements, site.traffic)


def _layer_services(
    site: Site, placements: dict[int, Placement], store: ExpertStore, balance: BalanceState, tp: TensorParallel
) -> dict[int, LayerServices]:
    """Of each MoE layer; layers that share a placement share the dispatcher and the rules that are made for it."""
    made: dict[int, tuple[Dispatcher, tuple[RoutingRule, ...]]] = {}
    services = {}
    for layer, placement in placements.items():
        if id(placement) not in made:
            made[id(placement)] = (_dispatcher_for(site, placement), _rules_for(site, placement))
        dispatcher, rules = made[id(placement)]
        services[layer] = LayerServices(store, dispatcher, balance[layer], rules, tp)
    return services


def _dispatcher_for(site: Site, placement: Placement) -> Dispatcher:
    return make_dispatcher(
        placement,
        site.groups,
        site.traffic,
        device=site.device,
        pieces=site.run.dispatch.pieces,
        padding=_padding(site.run),
    )


def _rules_for(site: Site, placement: Placement) -> tuple[RoutingRule, ...]:
    return make_rules(site.run.layer_config, placement, site.groups, site.traffic, device=site.device)


def _padding(run: RunConfig) -> Padding | None:
    """Bounds of padded messages: every rank's share of a full micro-batch."""
    if not run.dispatch.pad_to_capacity:
        return None
    num_tokens = -(-run.data.micro_batch * run.data.seq_len // run.mesh.tp)
    return Padding(num_tokens, rows_within_capacity(run.layer_config, num_tokens))


def tensor_parallel(groups: MeshGroups, counter: TrafficCounter | None = None) -> TensorParallel:
    """This rank's place in its tp group."""
    if groups.size("tp") == 1:
        return TensorParallel()
    return TensorParallel(groups.group("tp"), groups.group_rank("tp"), counter)


def compute_dtype(run: RunConfig, device: torch.device | str) -> torch.dtype:
    """The type that ``train.dtype`` names, on this device."""
    if run.train.dtype == "auto":
        return torch.bfloat16 if multiplies_bf16(device) else torch.float32
    named: torch.dtype = getattr(torch, run.train.dtype)
    return named


def _make_store(site: Site, placements: dict[int, Placement]) -> ExpertStore:
    run, groups, compute = site.run, site.groups, site.compute_dtype
    return ExpertStore(
        ExpertShape(width=run.model.width, hidden=run.moe.expert_width, gated=run.moe.gated),
        placements,
        SparseCollectives(groups.group("sparse"), groups.group_rank("sparse"), site.traffic),
        groups.pool_rank,
        compute_dtype=compute,
        master_dtype=torch.promote_types(compute, torch.float32),
        device=site.device,
    )
