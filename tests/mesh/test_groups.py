"""Process groups of a folded mesh on real gloo ranks, and on up to 4,096 pretended ones."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from known import grad_of, world_group
from mesh.test_folded_mesh import folded_meshes
from ranks import run_on_ranks
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from moetrain.mesh import groups as groups_module
from moetrain.mesh.folded_mesh import NODE_SETS, FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.mesh.sharing import GROUP_NAMES, ROWS

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
        assert isinstance(linear, FSDPModule)
        linear.set_gradient_divide_factor(1.0)
        linear.set_force_sum_reduction_for_comms(True)
        out = linear(torch.full((1, 4), rank + 1.0))
        out.sum().backward()
        grad = grad_of(linear.weight)
        assert isinstance(grad, DTensor)
        return device_mesh.mesh_dim_names or (), out.detach().flatten().tolist(), grad.full_tensor().flatten().tolist()
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


@pytest.mark.parametrize(
    "mesh",
    [FoldedMesh(dp_shard=2, ep=2), FoldedMesh(dp_replicate=2, dp_shard=2, ep=4)],
    ids=lambda mesh: mesh.world_size,
)
def test_a_closed_mesh_refers_to_no_group(mesh: FoldedMesh, fake_world: Any) -> None:
    fake_world(0, mesh.world_size)
    groups = MeshGroups.create(mesh)
    made = [groups.dense_mesh(), groups.dense_mesh()]
    if not hasattr(made[0], "_pg_registry"):
        pytest.skip("this torch's meshes hold no groups of their own")
    axes = 1 if mesh.dp_replicate == 1 else 2
    assert [len(device_mesh._pg_registry) for device_mesh in made] == [axes, axes]
    groups.close()
    assert [device_mesh._pg_registry for device_mesh in made] == [{}, {}]


SCALES = {
    8: FoldedMesh(dp_replicate=2, dp_shard=2, tp=2, ep=4, etp=2),
    64: FoldedMesh(pp=2, dp_replicate=2, dp_shard=4, cp=2, tp=2, edp=2, ep=8, etp=2),
    512: FoldedMesh(dp_replicate=4, dp_shard=32, tp=4, edp=8, ep=32, etp=2, two_level=True),
    4096: FoldedMesh(pp=4, dp_replicate=8, dp_shard=16, cp=2, tp=4, edp=16, ep=64),
}


def names_of(mesh: FoldedMesh) -> tuple[str, ...]:
    """Names of all groups but the sparse one."""
    return (*GROUP_NAMES, *(NODE_SETS if mesh.two_level else ()))


class Asked:
    """What one rank asks of torch, in its order: the ranks of each group, or a whole partition at once."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.groups: list[tuple[int, ...]] = []
        self.splits: list[tuple[tuple[int, ...], ...]] = []
        self.make = dist.new_group
        patch.setattr(dist, "new_group", self.new_group)
        patch.setattr(dist, "split_group", self.split_group)

    def new_group(self, ranks: list[int], **options: Any) -> Any:
        self.groups.append(tuple(ranks))
        return self.make(ranks, **options)

    def split_group(self, parent: Any, split_ranks: list[list[int]], timeout: Any, group_desc: str) -> Any:
        self.splits.append(tuple(map(tuple, split_ranks)))
        (mine,) = (ranks for ranks in split_ranks if dist.get_rank() in ranks)
        return self.make(mine, timeout=timeout, group_desc=group_desc)


def seen_by(rank: int, mesh: FoldedMesh, start: Any, bound: bool) -> Asked:
    """Create the groups of one rank, check that they are its own, and return what it asked for."""
    start(rank, mesh.world_size)
    if bound:
        world_group().bound_device_id = torch.device("cuda", 0)
    with pytest.MonkeyPatch.context() as patch:
        asked = Asked(patch)
        groups = MeshGroups.create(mesh)
    names = names_of(mesh)
    for name in (*names, "sparse"):
        ranks = mesh.group_of(rank, "pool" if name == "sparse" else name)
        assert groups.ranks(name) == ranks
        assert tuple(dist.get_process_group_ranks(groups.group(name))) == ranks
        same = {other for other in names if groups.group(other) is groups.group(name)}
        assert same == (set() if name == "sparse" else {other for other in names if groups.ranks(other) == ranks})
    shape = groups.dense_mesh().shape
    assert shape == ((mesh.dp_replicate, mesh.dp_shard * mesh.cp) if mesh.dp_replicate > 1 else (mesh.dp_shard,))
    groups.close()
    dist.destroy_process_group()
    return asked


@pytest.mark.parametrize(("world", "stride"), [(8, 1), (64, 1), (512, 73), (4096, 1365)])
def test_all_ranks_make_the_same_groups_in_one_order(world: int, stride: int, fake_world: Any) -> None:
    """Whatever the rank, the sequence of groups asked of torch is the same, and each is asked for once."""
    mesh = SCALES[world]
    orders = [seen_by(rank, mesh, fake_world, False).groups for rank in range(0, world, stride)]
    assert len(orders) >= 4
    assert all(order == orders[0] for order in orders)
    pools = list(mesh.all_groups("pool"))
    assert orders[0][-len(pools) :] == pools, "sparse groups come last"
    shared = orders[0][: -len(pools)]
    assert len(set(shared)) == len(shared)
    wanted = {ranks for name in names_of(mesh) for ranks in mesh.all_groups(name)}
    assert set(shared) == wanted - {tuple(range(world))}


@pytest.mark.parametrize(("world", "stride"), [(8, 1), (512, 73), (4096, 1365)])
def test_ranks_bound_to_gpus_split_the_world_once_for_all_groups_of_a_name(
    world: int, stride: int, fake_world: Any
) -> None:
    """Instead of one collective over the world for each of thousands of groups."""
    mesh = SCALES[world]
    seen = [seen_by(rank, mesh, fake_world, True) for rank in range(0, world, stride)]
    assert all(asked.splits == seen[0].splits and asked.groups == [] for asked in seen)
    splits = seen[0].splits
    assert len(splits) <= len(names_of(mesh)) + 1
    assert len(set(splits[:-1])) == len(splits) - 1
    assert splits[-1] == mesh.all_groups("pool")
    for split in splits:
        assert sorted(rank for ranks in split for rank in ranks) == list(range(world))


APART = [
    FoldedMesh(dp_shard=8, ep=8),
    FoldedMesh(dp_shard=2, tp=4, ep=4, edp=2),
    FoldedMesh(dp_shard=2, tp=4, ep=4, etp=2),
    FoldedMesh(dp_shard=8, tp=2, ep=8, etp=2, ranks_per_node=4, two_level=True),
    FoldedMesh(),
]


@pytest.mark.parametrize("mesh", APART, ids=lambda mesh: f"{mesh.world_size}-tp{mesh.tp}-ep{mesh.ep}-etp{mesh.etp}")
def test_on_gpus_rows_share_a_communicator_with_nothing_else(
    mesh: FoldedMesh, fake_world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a shared expert's collectives over tp, or FSDP's, would wait for tokens on their way."""
    monkeypatch.setattr(groups_module, "_connect", lambda groups, device_type: None)
    orders = []
    for rank in range(mesh.world_size):
        fake_world(rank, mesh.world_size)
        with pytest.MonkeyPatch.context() as patch:
            asked = Asked(patch)
            groups = MeshGroups.create(mesh, device_type="cuda")
        names = names_of(mesh)
        for name, other in itertools.combinations(names, 2):
            same = groups.group(name) is groups.group(other)
            of_one_kind = (name in ROWS) == (other in ROWS) or groups.size(name) == 1
            assert same == (groups.ranks(name) == groups.ranks(other) and of_one_kind), (name, other)
        assert {name for name in names if groups.group(name) is groups.group("sparse")} == set()
        orders.append(asked.groups)
        groups.close()
        dist.destroy_process_group()
    assert all(order == orders[0] for order in orders)


def test_a_rank_alone_splits_nothing(fake_world: Any) -> None:
    asked = seen_by(0, FoldedMesh(), fake_world, True)
    assert (asked.splits, asked.groups) == ([], [(0,)])


@given(folded_meshes(most_ranks=512), st.integers(0, 511), st.sampled_from([1, 2, 3, 4, 6, 8]), st.booleans())
@settings(deadline=None, max_examples=100)
def test_names_that_share_a_group_on_one_rank_share_them_on_all(
    plain: FoldedMesh, number: int, ranks_per_node: int, two_level: bool
) -> None:
    """Else ranks would disagree on how many groups there are to make."""
    try:
        mesh = replace(plain, ranks_per_node=ranks_per_node, two_level=two_level)
    except ValueError:  # such nodes cannot be served in two levels
        mesh = plain
    rank = number % mesh.world_size
    of_all = {name: mesh.all_groups(name) for name in names_of(mesh)}
    for name, other in itertools.combinations(of_all, 2):
        here = mesh.group_of(rank, name) == mesh.group_of(rank, other)
        assert here == (mesh.group_of(0, name) == mesh.group_of(0, other))
        assert here == (of_all[name] == of_all[other])


def test_errors_say_what_is_missing(fake_world: Any) -> None:
    with pytest.raises(RuntimeError, match="needs a default process group; call init_process_group first"):
        MeshGroups.create(FoldedMesh())
    fake_world(0, 4)
    with pytest.raises(ValueError, match="the mesh has 2 ranks but the default process group has 4; start 2 ranks"):
        MeshGroups.create(FoldedMesh(dp_shard=2, ep=2))
    groups = MeshGroups.create(FoldedMesh(dp_shard=4, ep=4))
    with pytest.raises(ValueError, match=r"unknown group 'shards'; .* did you mean 'shard'\?"):
        groups.group("shards")
