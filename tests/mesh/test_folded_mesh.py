"""Where ranks stand, against the definition by brute force."""

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.config import MeshConfig
from moetrain.mesh.folded_mesh import FoldedMesh

ATTENTION = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
EXPERTS = ("pp", "edp", "ep", "etp")


@st.composite
def folded_meshes(draw: st.DrawFn, most_ranks: int = 4096) -> FoldedMesh:
    """Deal the prime factors of a random pool size to the axes of either mesh."""
    primes: list[int] = []
    pp = draw(st.integers(1, 4))
    for prime in draw(st.lists(st.sampled_from([2, 2, 2, 3, 5, 7]), max_size=12)):
        if pp * math.prod(primes) * prime <= most_ranks:
            primes.append(prime)
    sizes: dict[str, Any] = dict.fromkeys((*ATTENTION, *EXPERTS), 1) | {"pp": pp}
    for axes in (ATTENTION[1:], EXPERTS[1:]):
        for prime in primes:
            sizes[draw(st.sampled_from(axes))] *= prime
    return FoldedMesh(**sizes)


@given(folded_meshes())
@settings(deadline=None, max_examples=60)
def test_coordinates_spell_the_rank_in_both_meshes(mesh: FoldedMesh) -> None:
    ranks = {0, mesh.world_size // 3, mesh.world_size - 1}
    for rank in ranks:
        for axes in (ATTENTION, EXPERTS):
            spelled = 0
            for axis in axes:  # outermost first, as digits of a mixed-radix number
                digit = mesh.coordinate(rank, axis)
                assert 0 <= digit < getattr(mesh, axis)
                spelled = spelled * getattr(mesh, axis) + digit
            assert spelled == rank
        assert mesh.pool_rank(rank) == rank - mesh.coordinate(rank, "pp") * mesh.pool_size


@given(folded_meshes(), st.sampled_from([*ATTENTION, *EXPERTS, "data", "shard", "pool", "world"]))
@settings(deadline=None, max_examples=120)
def test_groups_partition_the_world(mesh: FoldedMesh, name: str) -> None:
    groups = mesh.all_groups(name)
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.world_size))
    assert {len(group) for group in groups} == {mesh.size(name)}
    assert all(list(group) == sorted(group) for group in groups)
    assert list(groups) == sorted(groups)
    for group in {groups[0], groups[-1], groups[len(groups) // 2]}:
        assert mesh.group_of(group[-1], name) == group


@given(folded_meshes(most_ranks=96))
@settings(deadline=None, max_examples=40)
def test_a_group_is_every_rank_with_the_same_other_coordinates(mesh: FoldedMesh) -> None:
    cases = [
        (ATTENTION, ("cp", "tp")),
        (ATTENTION, ("dp_replicate", "tp")),
        (EXPERTS, ("edp",)),
        (EXPERTS, ("ep", "etp")),
    ]
    rank = mesh.world_size // 2
    for axes, inside in cases:
        others = [axis for axis in axes if axis not in inside]
        expected = tuple(
            peer
            for peer in range(mesh.world_size)
            if all(mesh.coordinate(peer, axis) == mesh.coordinate(rank, axis) for axis in others)
        )
        assert mesh.group_of(rank, inside) == expected


def test_a_folding_by_hand() -> None:
    """Two stages of eight: attention is dp 2 x cp 2 x tp 2, experts are edp 2 x ep 4."""
    mesh = FoldedMesh(pp=2, dp_shard=2, cp=2, tp=2, edp=2, ep=4)
    assert mesh.world_size == 16
    assert mesh.pool_size == 8
    assert mesh.group_of(13, "tp") == (12, 13)
    assert mesh.group_of(13, "cp") == (13, 15)
    assert mesh.group_of(13, "dp_shard") == (9, 13)
    assert mesh.group_of(13, "data") == (9, 11, 13, 15)
    assert mesh.group_of(13, "ep") == (12, 13, 14, 15)
    assert mesh.group_of(13, "edp") == (9, 13)
    assert mesh.group_of(13, "pool") == tuple(range(8, 16))
    assert mesh.group_of(13, "pp") == (5, 13)
    assert mesh.all_groups("pp")[:2] == ((0, 8), (1, 9))
    assert mesh.group_of(13, "world") == tuple(range(16))
    assert [mesh.coordinate(13, axis) for axis in ("pp", "dp_shard", "cp", "tp", "edp", "ep")] == [1, 1, 0, 1, 1, 1]
    assert (mesh.pool_rank(13), mesh.node_of(13), mesh.node_of(7)) == (5, 1, 0)


def test_4096_ranks_fold_as_the_tpu_sized_example_says() -> None:
    mesh = FoldedMesh(pp=4, dp_replicate=8, dp_shard=16, cp=2, tp=4, edp=16, ep=64)
    assert (mesh.world_size, mesh.pool_size) == (4096, 1024)
    assert len(mesh.all_groups("ep")) == 64
    assert mesh.group_of(4095, "ep") == tuple(range(4032, 4096))
    assert mesh.group_of(4095, "tp") == (4092, 4093, 4094, 4095)
    assert mesh.group_of(0, "edp") == tuple(range(0, 1024, 64))
    assert mesh.group_of(0, "dp_replicate") == tuple(range(0, 1024, 128))


def test_configuration_resolves_to_a_mesh() -> None:
    mesh = FoldedMesh.from_config(MeshConfig(dp_replicate=2, ep=4, ranks_per_node=4), 8)
    assert mesh == FoldedMesh(dp_replicate=2, dp_shard=4, edp=2, ep=4, ranks_per_node=4)
    with pytest.raises(ValueError, match=r"must divide the number of ranks, 8"):
        FoldedMesh.from_config(MeshConfig(ep=3), 8)


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        (
            {"dp_shard": 8, "ep": 3},
            r"dp_replicate=1 \* dp_shard=8 \* cp=1 \* tp=1 = 8 and edp=1 \* ep=3 \* etp=1 = 3; "
            r"nearest legal expert axes: edp=2 ep=4 etp=1, or ",
        ),
        ({"dp_shard": 5, "ep": 2, "edp": 2}, r"nearest legal expert axes: edp=5 ep=1 etp=1, or edp=1 ep=5 etp=1"),
        ({"tp": 0}, r"mesh\.tp must be at least 1, got 0; set it to 1 or more"),
        ({"ranks_per_node": 0}, r"mesh\.ranks_per_node must be at least 1, got 0"),
    ],
)
def test_errors_name_the_axes_and_the_cure(sizes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        FoldedMesh(**sizes)


def test_a_size_that_is_no_number_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"mesh\.ep must be int, got '4'"):
        FoldedMesh(ep="4")  # type: ignore[arg-type]


def test_lookups_outside_the_mesh_are_refused() -> None:
    mesh = FoldedMesh(dp_shard=4, ep=4)
    with pytest.raises(ValueError, match="rank must be between 0 and 3, got 4; the mesh has 4 ranks"):
        mesh.coordinate(4, "ep")
    with pytest.raises(ValueError, match="rank must be between 0 and 3, got -1"):
        mesh.pool_rank(-1)
    with pytest.raises(ValueError, match=r"unknown axis 'dp_shards'; .* did you mean 'dp_shard'\?"):
        mesh.group_of(0, "dp_shards")
    with pytest.raises(ValueError, match="axes tp, ep belong to different meshes"):
        mesh.all_groups(("tp", "ep"))


def test_the_checks_notice_a_wrong_stride() -> None:
    """Mutation: with cp and tp swapped in the rank order, the folding by hand no longer holds."""

    class Swapped(FoldedMesh):
        def _stride(self, axis: str) -> int:
            return super()._stride({"cp": "tp", "tp": "cp"}.get(axis, axis))

    right: dict[str, Any] = {"pp": 2, "dp_shard": 2, "cp": 4, "tp": 2, "edp": 2, "ep": 8}
    assert Swapped(**right).group_of(13, "tp") != FoldedMesh(**right).group_of(13, "tp")


@given(folded_meshes(), st.sampled_from([1, 2, 3, 4, 6, 8, 16]))
@settings(deadline=None, max_examples=150)
def test_two_levels_cut_ep_groups_into_equal_nodes_or_are_refused(mesh: FoldedMesh, ranks_per_node: int) -> None:
    """Refused are unequal shares of nodes, inside a group or from group to group."""
    plain = replace(mesh, ranks_per_node=ranks_per_node)
    shares = [sorted(Counter(map(plain.node_of, ranks)).values()) for ranks in plain.all_groups("ep")]
    if any(share != shares[0] or len(set(share)) > 1 for share in shares):
        with pytest.raises(ValueError, match="all ep groups must have as many ranks on each of their nodes") as caught:
            replace(plain, two_level=True)
        assert_tried(plain, str(caught.value))
        return
    split = replace(plain, two_level=True)
    for rank in {0, mesh.world_size // 3, mesh.world_size - 1}:
        inside, between = split.group_of(rank, "ep_inside"), split.group_of(rank, "ep_between")
        assert set(inside) & set(between) == {rank}
        assert len(inside) * len(between) == mesh.ep
        assert {split.node_of(other) for other in inside} == {split.node_of(rank)}
        assert len({split.node_of(other) for other in between}) == len(between)
        assert {split.group_of(other, "ep_inside").index(other) for other in between} == {inside.index(rank)}
        # Nodes are outermost in the group, as the dispatcher counts them.
        group = mesh.group_of(rank, "ep")
        assert group.index(rank) == between.index(rank) * len(inside) + inside.index(rank)


def assert_tried(plain: FoldedMesh, refusal: str) -> None:
    """The axes that a refusal of two levels lists, nearest first, are legal, and are others."""
    _, _, listed = refusal.partition("nearest legal axes: ")
    choices = [dict(part.split("=") for part in text.split()) for text in listed.partition(";")[0].split(", or ")]
    sizes = [{axis: int(size) for axis, size in choice.items()} for choice in choices]
    assert 1 <= len(sizes) <= 3
    for axes in sizes:
        chosen = replace(plain, two_level=True, **axes)
        assert chosen.ep != plain.ep
        assert (chosen.etp, chosen.pool_size) == (plain.etp, plain.pool_size)
    far = [abs(math.log(axes["ep"] / plain.ep)) for axes in sizes]
    assert far == sorted(far)


def test_two_levels_by_hand() -> None:
    mesh = FoldedMesh(dp_shard=16, ep=8, etp=2, ranks_per_node=4, two_level=True)
    assert mesh.group_of(7, "ep") == (1, 3, 5, 7, 9, 11, 13, 15)
    assert mesh.group_of(7, "ep_inside") == (5, 7)
    assert mesh.group_of(7, "ep_between") == (3, 7, 11, 15)
    assert mesh.all_groups("ep_between") == ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
    with pytest.raises(ValueError, match=r"mesh.two_level: .* ep=4 \* etp=1 = 4 does not fit nodes of 3 ranks"):
        FoldedMesh(dp_shard=4, ep=4, ranks_per_node=3, two_level=True)
    with pytest.raises(ValueError, match="nearest legal axes: edp=3 ep=2 etp=1, or edp=6 ep=1 etp=1; or set"):
        FoldedMesh(dp_shard=6, ep=6, ranks_per_node=4, two_level=True)
