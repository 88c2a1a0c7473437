"""The process groups of one rank of a folded mesh, created once, in one order that is the same on every rank."""

from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from moetrain.config.errors import nearest, require
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.sharing import OF, sharing


@dataclass(slots=True)
class MeshGroups:
    """Process groups by name; groups of the same ranks are one group.

    Exceptions are groups whose collectives may be under way beside others, since NCCL runs those of one communicator
    one after another. ``"sparse"`` has the ranks of ``"pool"`` and a communicator that nothing else uses: expert
    weights travel through it. ``"ring"``, where ranks may share sequences, is for these likewise, with the ranks of
    ``"data"``. On GPUs groups of ``ROWS`` share with one another alone, so that neither
    tp's collectives of a shared expert nor FSDP's wait for tokens on their way.
    """

    mesh: FoldedMesh
    rank: int
    device_type: str
    _groups: dict[str, ProcessGroup]
    _ranks: dict[str, tuple[int, ...]]
    _created: list[ProcessGroup] = field(default_factory=list)
    _meshes: list[DeviceMesh] = field(default_factory=list)

    @classmethod
    def create(
        cls, mesh: FoldedMesh, *, device_type: str = "cpu", timeout: timedelta | None = None, gangs: bool = False
    ) -> "MeshGroups":
        """Create the groups. A collective: every rank calls it with the same mesh.

        Args:
            mesh: where ranks stand.
            device_type: ``"cpu"`` or ``"cuda"``; what ``dense_mesh`` is made for.
            timeout: of each collective; torch's default for the backend when left out.
            gangs: make the group ``"ring"`` too, for ranks that share sequences.

        Raises:
            RuntimeError: there is no default process group.
            ValueError: the default group has another number of ranks than the mesh.
        """
        if not dist.is_initialized():
            raise RuntimeError("MeshGroups.create needs a default process group; call init_process_group first")
        require(
            dist.get_world_size() == mesh.world_size,
            f"MeshGroups.create: the mesh has {mesh.world_size} ranks but the default process group has "
            f"{dist.get_world_size()}; start {mesh.world_size} ranks or change the mesh",
        )
        rank, default = dist.get_rank(), dist.group.WORLD
        assert default is not None
        shared_with, made = sharing(mesh, device_type == "cuda", gangs), {"world": default}
        for name in shared_with:
            if name not in made and shared_with[name] == name:
                partition = mesh.all_groups(OF.get(name, name))
                made[name] = _own_group(partition, rank, timeout, f"moetrain {name}")
        created = [group for group in made.values() if group is not default]
        ranks_of = {name: mesh.group_of(rank, OF.get(name, name)) for name in shared_with}
        groups = {name: made[first] for name, first in shared_with.items()}
        _connect([*created, default] if device_type == "cuda" else [default], device_type)
        return cls(mesh, rank, device_type, groups, ranks_of, created)

    @property
    def pool_rank(self) -> int:
        """This rank inside its expert pool."""
        return self.mesh.pool_rank(self.rank)

    def group(self, name: str) -> ProcessGroup:
        """The process group ``name`` that this rank is in.

        Raises:
            ValueError: no group has that name.
        """
        self._check_name(name)
        return self._groups[name]

    def size(self, name: str) -> int:
        """Number of ranks in the group."""
        return len(self.ranks(name))

    def ranks(self, name: str) -> tuple[int, ...]:
        """Global ranks of the group, ascending."""
        self._check_name(name)
        return self._ranks[name]

    def group_rank(self, name: str) -> int:
        """This rank's position in the group."""
        return self.ranks(name).index(self.rank)

    def dense_mesh(self) -> DeviceMesh:
        """The mesh that FSDP2 shards dense parameters over, made of the groups above.

        Returns:
            A 1-D mesh ``("dp_shard",)``, or where dense parameters are also replicated (HSDP) a 2-D mesh
            ``("dp_replicate", "dp_shard")``. Its shard axis is dp_shard x cp.
        """
        shard = self.group("shard")
        if self.mesh.dp_replicate == 1:
            made = DeviceMesh.from_group(shard, self.device_type, mesh_dim_names=("dp_shard",))
        else:
            ranks = torch.tensor(self.ranks("data")).view(self.mesh.dp_replicate, self.size("shard"))
            names = ("dp_replicate", "dp_shard")
            groups = [self.group("dp_replicate"), shard]
            made = DeviceMesh.from_group(groups, self.device_type, mesh=ranks, mesh_dim_names=names)
        self._meshes.append(made)
        return made

    def close(self) -> None:
        """Destroy the groups that ``create`` made; the default group stays. Later calls do nothing."""
        while self._meshes:  # torch 2.11 keeps meshes, and these their groups: findings/dtensor_views_are_kept.sh
            getattr(self._meshes.pop(), "_pg_registry", {}).clear()
        while self._created:
            dist.destroy_process_group(self._created.pop())

    def _check_name(self, name: str) -> None:
        if name not in self._groups:
            near = nearest(name, self._groups)
            hint = f"did you mean {near!r}?" if near else "choose one of these"
            raise ValueError(f"MeshGroups: unknown group {name!r}; groups are {', '.join(self._groups)}; {hint}")


def _own_group(
    partition: tuple[tuple[int, ...], ...], rank: int, timeout: timedelta | None, description: str
) -> ProcessGroup:
    """Cut the world into ``partition`` and return the part with ``rank``. Collective over the world.

    Where the default group is bound to its GPU, ``new_group`` splits NCCL's communicator of the whole world, with a
    call by every rank, also of those outside of the group: thousands of calls for thousands of ranks. One split makes
    all parts. Elsewhere a group costs a rank outside of it nothing but a name.
    """
    default = dist.group.WORLD
    assert default is not None
    device = default.bound_device_id
    if device is not None and device.type == "cuda" and default.size() > 1:
        mine = dist.split_group(default, [list(ranks) for ranks in partition], timeout, group_desc=description)
    else:
        made = {ranks: dist.new_group(list(ranks), timeout=timeout, group_desc=description) for ranks in partition}
        mine = next(group for ranks, group in made.items() if rank in ranks)
    assert mine is not None
    return mine


def _connect(groups: list[ProcessGroup], device_type: str) -> None:
    """Use each group once, in creation order.

    NCCL then has its communicators, so that the first point-to-point call may omit ranks. On gloo the default group
    is enough: it keeps a rank from leaving while others still connect to it, which they would retry for ever.
    """
    for group in groups:
        dist.all_reduce(torch.zeros(1, device=device_type), group=group)
