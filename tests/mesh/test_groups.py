"""Process groups of a folded mesh on real gloo ranks, and on 512 pretended ones."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import GROUP_NAMES, MeshGroups

NAMES = (*GROUP_NAMES, "sparse")


@pytest.fixture
def fake_world() -> Iterator[Any]:
    """A function that pretends to be one rank of a world of any size."""

    def start(rank: int, world_size: int) -> None:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_of_ranks(rank: int, mesh: FoldedMesh) -> dict[str, tuple[int, int, list[int]]]:
    """For each group: its sum of 10 ** rank, this rank's place, its ranks."""
    groups = MeshGroups.create(mesh)
    try:
        found = {}
        for name in NAMES:
            value = torch.tensor(10**rank)
            dist.all_reduce(value, group=groups.group(name))
            assert dist.get_process_group_ranks(groups.group(name)) == list(groups.ranks(name))
            assert groups.group(name).size() == groups.size(name)
            assert groups.group(name).rank() == groups.group_rank(name)
            found[name] = (int(value), groups.group_rank(name), list(groups.ranks(name)))
        return found
    finally:
        groups.close()
        groups.close()


def who_shares(rank: int, mesh: FoldedMesh) -> tuple[int, bool, bool, bool]:
    groups = MeshGroups.create(mesh)
    try:
        return (
            len(groups._created),
            groups.group("world") is groups.group("pool"),
            groups.group("dp_shard") is groups.group("ep"),
            groups.group("sparse") is groups.group("pool"),
        )
    finally:
        groups.close()


def sharded_gradient(rank: int, mesh: FoldedMesh) -> tuple[tuple[str, ...], list[float], list[float]]:
    """One FSDP2 step over the dense mesh: y = w * (rank + 1), gradients summed over ranks."""
    groups = MeshGroups.create(mesh)
    try:
        device_mesh = groups.dense_mesh()
        linear = torch.nn.Linear(4, 1, bias=False)
        torch.nn.init.constant_(linear.weight, 2.0)
        fully_shard(linear, mesh=device_mesh)
        linear.set_gradient_divide_factor(1.0)
        linear.set_force_sum_reduction_for_comms(True)
        out = linear(torch.full((1, 4), rank + 1.0))
        out.sum().backward()
        grad = linear.weight.grad.full_tensor().flatten().tolist()
        return device_mesh.mesh_dim_names, out.detach().flatten().tolist(), grad
    finally:
        groups.close()


@pytest.mark.dist
@pytest.mark.parametrize(
    "mesh",
    [
        FoldedMesh(),
        FoldedMesh(dp_shard=4, ep=4),
        FoldedMesh(dp_replicate=2, dp_shard=2, edp=2, ep=2),
        FoldedMesh(pp=2, tp=2, ep=2),
        FoldedMesh(dp_shard=3, edp=3),
    ],
    ids=lambda mesh: f"{mesh.world_size}-ep{mesh.ep}-pp{mesh.pp}",
)
def test_every_group_sums_its_own_ranks(mesh: FoldedMesh) -> None:
    for rank, found in enumerate(run_on_ranks(mesh.world_size, sum_of_ranks, mesh)):
        for name in NAMES:
            ranks = mesh.group_of(rank, "pool" if name == "sparse" else name)
            assert found[name] == (sum(10**peer for peer in ranks), ranks.index(rank), list(ranks))


@pytest.mark.dist
def test_groups_of_the_same_ranks_are_one_group_except_the_sparse_one() -> None:
    mesh = FoldedMesh(dp_replicate=2, dp_shard=2, edp=2, ep=2)
    for created, pool_is_world, shard_is_ep, sparse_is_pool in run_on_ranks(4, who_shares, mesh):
        assert (created, pool_is_world, shard_is_ep, sparse_is_pool) == (4, True, True, False)


@pytest.mark.dist
@pytest.mark.parametrize(
    "mesh", [FoldedMesh(), FoldedMesh(dp_shard=2, ep=2), FoldedMesh(dp_replicate=2, dp_shard=2, ep=4)]
)
def test_fsdp_shards_over_the_dense_mesh(mesh: FoldedMesh) -> None:
    names = ("dp_shard",) if mesh.dp_replicate == 1 else ("dp_replicate", "dp_shard")
    total = sum(range(1, mesh.world_size + 1))
    results = run_on_ranks(mesh.world_size, sharded_gradient, mesh)
    for rank, result in enumerate(results):
        assert result == (names, [8.0 * (rank + 1)], [float(total)] * 4)


def test_large_worlds_make_their_groups_in_one_order(fake_world: Any) -> None:
    """Whatever the rank, the sequence of groups asked of torch is the same, and each is asked for once."""
    mesh = FoldedMesh(pp=2, dp_replicate=4, dp_shard=16, cp=2, tp=2, edp=16, ep=16)
    orders = []
    for rank in (0, 511):
        asked: list[tuple[int, ...]] = []
        with pytest.MonkeyPatch.context() as patch:
            make = dist.new_group

            def record(ranks: list[int], *, asked: list[Any] = asked, make: Any = make, **options: Any) -> Any:
                asked.append(tuple(ranks))
                return make(ranks, **options)

            patch.setattr(dist, "new_group", record)
            fake_world(rank, mesh.world_size)
            groups = MeshGroups.create(mesh)
            patch.undo()
        assert groups.ranks("ep") == mesh.group_of(rank, "ep")
        assert groups.size("data") == 128
        assert groups.pool_rank == mesh.pool_rank(rank)
        assert groups.dense_mesh().shape == (4, 32)
        orders.append(asked)
        groups.close()
        dist.destroy_process_group()
    assert orders[0] == orders[1]
    pools = list(mesh.all_groups("pool"))
    assert orders[0][-len(pools) :] == pools, "sparse groups come last"
    shared = orders[0][: -len(pools)]
    assert len(set(shared)) == len(shared)


def test_errors_say_what_is_missing(fake_world: Any) -> None:
    with pytest.raises(RuntimeError, match="needs a default process group; call init_process_group first"):
        MeshGroups.create(FoldedMesh())
    fake_world(0, 4)
    with pytest.raises(ValueError, match="the mesh has 2 ranks but the default process group has 4; start 2 ranks"):
        MeshGroups.create(FoldedMesh(dp_shard=2, ep=2))
    groups = MeshGroups.create(FoldedMesh(dp_shard=4, ep=4))
    with pytest.raises(ValueError, match=r"unknown group 'shards'; .* did you mean 'shard'\?"):
        groups.group("shards")
