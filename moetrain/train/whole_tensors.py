"""Whole parameters and gradients, on every rank: for checks and small models. Shapes: E experts, D width, F width.

Names are logical ones (``models.names``). A layer's experts are stacked: ``layers.{l}.moe.experts.w_in``
[E, 2 or 1, F, D] and ``.w_out`` [E, D, F].
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.mesh.collectives import all_reduce_sum
from moetrain.mesh.groups import MeshGroups
from moetrain.models import names
from moetrain.placement.store import ExpertStore
from moetrain.train.shards import Shard, zeros_if_none


@dataclass(frozen=True, slots=True, eq=False)
class WholeTensors:
    """Gathers from, and fills, what the ranks of a pool own.

    Args:
        dense: this rank's shards of the model's own parameters.
        experts: its shards of the store's.
        store: the experts.
        groups: this rank's process groups.
    """

    dense: Sequence[Shard]
    experts: Sequence[Shard]
    store: ExpertStore
    groups: MeshGroups

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter. Collective."""
        return self._gather(lambda shard: shard.local() if shard.expert_layer is None else shard.value.detach())

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the last step as the optimizer saw them (clipped). Collective."""
        return self._gather(lambda shard: zeros_if_none(shard.value.grad, shard.value.detach()))

    @torch.no_grad()
    def load(self, full: Mapping[str, Tensor]) -> None:
        """Take every parameter from whole tensors named as in ``parameters``; the optimizer's state stays.

        Raises:
            ValueError: a name is missing or unknown, or a shape differs.
        """
        self._check_names(full)
        for shard in self.dense:
            local = shard.local()
            local.copy_(full[shard.name][shard.region(local)])
        flats = {
            layer: torch.cat([full[names.stacked(layer, matrix)].flatten(1) for matrix in names.MATRICES], dim=1)
            for layer in self.store.layers
        }
        self.store.initialise(lambda layer, expert, index_N: flats[layer][expert, index_N.to(self.store.device)])
        self.store.advance_epoch()

    def _gather(self, values: Callable[[Shard], Tensor]) -> dict[str, Tensor]:
        full = {shard.name: self._whole(shard, values(shard)) for shard in self.dense}
        for shard in self.experts:
            full.update(self._stacked(shard, values(shard)))
        return full

    def _whole(self, shard: Shard, local: Tensor) -> Tensor:
        """A dense tensor, each element from the lowest rank that has it. Collective."""
        group, rank = self.groups.group("pool"), self.groups.group_rank("pool")
        region = shard.region(local)
        source = torch.full(shard.shape, self.groups.size("pool"), dtype=torch.int32, device=local.device)
        source[region] = rank
        dist.all_reduce(source, op=dist.ReduceOp.MIN, group=group)
        full = local.new_zeros(shard.shape)
        full[region] = torch.where(source[region] == rank, local, 0)
        return all_reduce_sum(full, group)

    def _stacked(self, shard: Shard, owned: Tensor) -> dict[str, Tensor]:
        """Experts of one layer, from what each rank owns, as two stacked tensors on every rank."""
        layer = shard.expert_layer
        assert layer is not None
        flat = self.store.full_expert(layer, {layer: owned})
        w_in, w_out = self.store.shape.split(torch.stack([flat[expert] for expert in sorted(flat)]))
        return {names.stacked(layer, "w_in"): w_in.contiguous(), names.stacked(layer, "w_out"): w_out.contiguous()}

    def _check_names(self, full: Mapping[str, Tensor]) -> None:
        shape = self.store.shape
        wanted: dict[str, tuple[int, ...]] = {shard.name: shard.shape for shard in self.dense}
        for layer in self.store.layers:
            num_experts = self.store.placement(layer).num_experts
            wanted[names.stacked(layer, "w_in")] = (num_experts, *shape.w_in_shape)
            wanted[names.stacked(layer, "w_out")] = (num_experts, *shape.w_out_shape)
        if wrong := sorted(wanted.keys() ^ full.keys()):
            raise ValueError(
                f"WholeTensors.load: names must be the model's, but {', '.join(wrong[:4])} are missing or unknown; "
                "give every parameter of WholeTensors.parameters() and no other"
            )
        for name, dims in wanted.items():
            if tuple(full[name].shape) != tuple(dims):
                raise ValueError(f"WholeTensors.load: {name} must be {list(dims)}, got {list(full[name].shape)}")
