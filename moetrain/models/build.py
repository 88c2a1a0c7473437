"""From a run's configuration to a model on this rank: built without memory, sharded, then filled.

FSDP2 holds the dense parameters, the ``ExpertStore`` the experts. Gradients are sums over ranks, never means: losses
are divided once, by the step's global counts.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from moetrain.config import RunConfig
from moetrain.mesh.groups import MeshGroups
from moetrain.mesh.tensor_parallel import TensorParallel
from moetrain.mesh.traffic import TrafficCounter
from moetrain.models.init import expert_values, fill_parameters
from moetrain.models.transformer import Block, Transformer
from moetrain.moe.balance.state import BalanceState
from moetrain.moe.dispatch.all_to_all import make_dispatcher
from moetrain.moe.dispatch.padded import Padding
from moetrain.moe.layer import MoELayer
from moetrain.moe.routers.token_choice import Router, RouterOutput
from moetrain.moe.rules.capacity import rows_within_capacity
from moetrain.moe.rules.rounding import make_rounding
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


def build_model(run: RunConfig, groups: MeshGroups, device: torch.device | str) -> BuiltModel:
    """Build, shard and fill the model that ``run`` describes. Every rank of the world calls it.

    Args:
        run: the configuration; ``train.dtype`` is the type of compute, masters are at least float32.
        groups: this rank's process groups.
        device: where parameters live.
    """
    compute = compute_dtype(run, device)
    placement = plan_static(groups.mesh, run.moe.num_experts)
    placements = dict.fromkeys(run.model.moe_layers, placement)
    traffic = TrafficCounter(ranks_per_node=groups.mesh.ranks_per_node)
    store = _make_store(run, groups, placements, device, traffic)
    balance = BalanceState(run.model.moe_layers, run.layer_config, device=device, dtype=compute)
    dispatcher = make_dispatcher(
        placement, groups, traffic, device=device, pieces=run.dispatch.pieces, padding=_padding(run)
    )
    rounding = make_rounding(run.layer_config, placement, groups, traffic, device=device)
    tp = tensor_parallel(groups, traffic)
    with torch.device("meta"):
        model = Transformer(
            run.model,
            run.moe,
            lambda layer: MoELayer(run.model, run.layer_config, layer, store, dispatcher, balance, rounding, tp),
            run.train.activation_checkpoint,
            tp,
        ).to(store.master_dtype)
    shard_model(model, groups.dense_mesh(), compute, run.train.reshard_after_forward)
    model.to_empty(device=device)
    fill_parameters(model, run.model, run.seed, model.cuts())
    shape = ExpertShape(width=run.model.width, hidden=run.moe.expert_width, gated=run.moe.gated)
    store.initialise(expert_values(run.model, shape, run.seed))
    return BuiltModel(model, store, balance, placements, traffic)


def _padding(run: RunConfig) -> Padding | None:
    """Bounds of padded messages: every rank's part of a full micro-batch."""
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


def shard_model(model: Transformer, mesh: DeviceMesh, compute: torch.dtype, reshard_after_forward: bool = True) -> None:
    """Apply FSDP2: one group per block, one per router (which computes in its master's type), one for the rest.

    Embedding, final norm, head and the small routers stay whole from the first forward to the last backward pass of
    a step, and so do blocks unless ``reshard_after_forward``; without gradients, all are resharded at once, since
    nothing else would do so before their masters change.
    """
    narrow = compute if torch.promote_types(compute, torch.float32) != compute else None
    policy = MixedPrecisionPolicy(
        param_dtype=narrow, reduce_dtype=torch.float32 if narrow else None, cast_forward_inputs=False
    )
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    num_ranks = mesh.size(-1)

    def placement_of(parameter: nn.Parameter) -> Shard:
        """Cut [2, F, D] along F where two rows are too few for the ranks (dimension 1 must divide evenly)."""
        few_rows = parameter.dim() == 3 and parameter.shape[0] < num_ranks
        return Shard(1) if few_rows and parameter.shape[1] % num_ranks == 0 else Shard(0)

    for router in [part for part in model.modules() if isinstance(part, Router)]:
        router.register_forward_hook(_weights_of_their_own)
        fully_shard(router, mesh=mesh, mp_policy=exact, reshard_after_forward=False)
    for block in model.layers:
        fully_shard(
            block,
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=reshard_after_forward,
            shard_placement_fn=placement_of,
        )
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo has no scaled sum; with it FSDP would ask for one even to multiply by 1.
            module.set_force_sum_reduction_for_comms(True)
            module.register_forward_hook(_reshard_without_gradients)


def set_gradient_sync(model: nn.Module, last: bool, reshard_after_forward: bool = True) -> None:
    """Say whether the coming backward pass is its step's last.

    Only then are gradients reduced over ranks, and what ``shard_model`` keeps whole is resharded.
    """
    if not isinstance(model, FSDPModule):
        return
    model.set_requires_gradient_sync(last)
    model.set_is_last_backward(last)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            sharded = reshard_after_forward and isinstance(module, Block)
            module.set_reshard_after_backward(last or sharded, recurse=False)


def _make_store(
    run: RunConfig,
    groups: MeshGroups,
    placements: dict[int, Placement],
    device: torch.device | str,
    traffic: TrafficCounter,
) -> ExpertStore:
    compute = compute_dtype(run, device)
    collectives = SparseCollectives(groups.group("sparse"), groups.group_rank("sparse"), traffic)
    return ExpertStore(
        ExpertShape(width=run.model.width, hidden=run.moe.expert_width, gated=run.moe.gated),
        placements,
        collectives,
        groups.pool_rank,
        compute_dtype=compute,
        master_dtype=torch.promote_types(compute, torch.float32),
        device=device,
    )


def _weights_of_their_own(module: nn.Module, args: object, output: RouterOutput) -> RouterOutput:
    """FSDP hooks into the tensors that a module returns, which for that must not be views of others."""
    routing = output.routing
    return replace(output, routing=replace(routing, weight_N=routing.weight_N.clone()))


def _reshard_without_gradients(module: nn.Module, args: object, output: object) -> None:
    if isinstance(module, FSDPModule) and not torch.is_grad_enabled():
        module.reshard()
