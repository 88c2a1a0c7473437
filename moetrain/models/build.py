"""From a run's configuration to a model on this rank: built without memory, sharded, then filled.

FSDP2 holds the dense parameters, the ``ExpertStore`` the experts. Gradients are sums over ranks, never means: losses
are divided once, by the step's global counts.
"""

from dataclasses import dataclass

import torch

from moetrain.config import RunConfig
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.mesh.tensor_parallel import TensorParallel
from moetrain.mesh.traffic import TrafficCounter
from moetrain.models.fsdp import shard_model
from moetrain.models.init import expert_values, fill_parameters
from moetrain.models.transformer import Transformer
from moetrain.moe.balance.state import BalanceState
from moetrain.moe.dispatch.all_to_all import make_dispatcher, make_seat_tables
from moetrain.moe.dispatch.padded import Padding
from moetrain.moe.layer import LayerServices, MoELayer
from moetrain.moe.rules.capacity import rows_within_capacity
from moetrain.moe.rules.make import make_rules
from moetrain.ops.native import multiplies_bf16
from moetrain.placement.chunks import ExpertShape
from moetrain.placement.current import CurrentPlacement
from moetrain.placement.loads import ExpertLoads
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
        placed: where the experts of each MoE layer are.
        loads: what this rank sends to them; None where experts never move and nobody keeps a trace.
        traffic: rows and bytes that this rank sent, by purpose.
    """

    model: Transformer
    store: ExpertStore
    balance: BalanceState
    placed: dict[int, CurrentPlacement]
    loads: ExpertLoads | None
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
    first = plan_static(groups.mesh, run.moe.num_experts)
    placed = {layer: CurrentPlacement(first) for layer in run.model.moe_layers}
    store = _make_store(site, placed)
    balance = BalanceState(run.model.moe_layers, run.layer_config, device=device, dtype=site.compute_dtype)
    counted = run.placement.moves or run.placement.trace
    loads = ExpertLoads(run.model.moe_layers, run.moe.num_experts, device) if counted else None
    services = _layer_services(site, placed, store, balance, loads)
    with torch.device("meta"):
        model = Transformer(
            run.model,
            run.moe,
            lambda layer: MoELayer(run.model.width, run.layer_config, layer, services[layer]),
            run.train.activation_checkpoint,
            tensor_parallel(groups, site.traffic),
        ).to(store.master_dtype)
    shard_model(model, groups.dense_mesh(), site.compute_dtype, run.train.reshard_after_forward)
    model.to_empty(device=device)
    fill_parameters(model, run.model, run.seed, model.cuts())
    store.initialise(expert_values(run.model, store.shape, run.seed))
    return BuiltModel(model, store, balance, placed, loads, site.traffic)


def _layer_services(
    site: Site,
    placed: dict[int, CurrentPlacement],
    store: ExpertStore,
    balance: BalanceState,
    loads: ExpertLoads | None,
) -> dict[int, LayerServices]:
    """Of each MoE layer; layers share the rules, and the tables of placements."""
    run, tp = site.run, tensor_parallel(site.groups, site.traffic)
    first = next(iter(placed.values())).now
    moves = run.placement.moves
    rules = make_rules(run.layer_config, None if moves else first, site.groups, site.traffic, device=site.device)
    tile = run.dispatch.tile if moves and run.dispatch.rounding != "none" else None
    tables = make_seat_tables(
        site.groups,
        device=site.device,
        most_held=most_held(run, first) if moves and run.dispatch.pad_to_capacity else None,
        whole_tiles=tile is not None,
    )
    services = {}
    for layer, where in placed.items():
        dispatcher = make_dispatcher(
            where,
            site.groups,
            site.traffic,
            tables=tables,
            pieces=run.dispatch.pieces,
            padding=_padding(run),
            tile=tile,
        )
        services[layer] = LayerServices(store, dispatcher, balance[layer], rules, tp, loads)
    return services


def most_held(run: RunConfig, first: Placement) -> int:
    """Experts of a layer that a rank can come to hold: what it may own, and its slots.

    Args:
        run: the configuration.
        first: where experts are at first.
    """
    if not run.placement.moves:
        return first.most_held()
    num_experts, owned = run.moe.num_experts, owned_at_most(run, first.num_groups)
    held = num_experts if run.placement.planner == "full" else owned + run.placement.slots
    return min(num_experts, held)


def owned_at_most(run: RunConfig, num_groups: int) -> int:
    """Experts of a layer that one of the pool's groups may come to own."""
    num_experts = run.moe.num_experts
    if run.placement.move_owners_every:  # uneven in a layer, even over all of them
        return min(num_experts, -(-num_experts * len(run.model.moe_layers) // num_groups))
    return -(-num_experts // num_groups)


def most_owned(run: RunConfig, mesh: FoldedMesh) -> int | None:
    """Experts of a layer that a group may come to own, where messages are sized by that; else None."""
    sized = run.placement.moves and run.dispatch.pad_to_capacity
    return owned_at_most(run, mesh.edp * mesh.ep) if sized else None


def _padding(run: RunConfig) -> Padding | None:
    """Bounds of padded messages: every rank's share of a full micro-batch."""
    if not run.dispatch.pad_to_capacity:
        return None
    num_tokens = -(-run.capacity // run.mesh.tp)
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


def _make_store(site: Site, placed: dict[int, CurrentPlacement]) -> ExpertStore:
    run, groups, compute = site.run, site.groups, site.compute_dtype
    return ExpertStore(
        ExpertShape(width=run.model.width, hidden=run.moe.expert_width, gated=run.moe.gated),
        placed,
        SparseCollectives(
            groups.group("sparse"), groups.group_rank("sparse"), site.traffic, ranks_per_node=_two_level_nodes(site)
        ),
        groups.pool_rank,
        compute_dtype=compute,
        master_dtype=torch.promote_types(compute, torch.float32),
        device=site.device,
    )


def _two_level_nodes(site: Site) -> int | None:
    """Ranks of a node where replicas cross between nodes once, by a leader on each: where dispatch does so too."""
    mesh = site.groups.mesh
    per_node = mesh.ranks_per_node
    spans_nodes = mesh.two_level and per_node < mesh.pool_size
    return per_node if spans_nodes and site.run.placement.moves and mesh.pool_size % per_node == 0 else None
