"""FSDP2 over the dense parameters of a transformer. Gradients are sums over ranks, never means."""

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from moetrain.models.transformer import Block, Transformer
from moetrain.moe.routers.contract import Router


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

    for router in [module for module in model.modules() if isinstance(module, Router)]:
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


def _reshard_without_gradients(module: nn.Module, args: object, output: object) -> None:
    if isinstance(module, FSDPModule) and not torch.is_grad_enabled():
        module.reshard()
