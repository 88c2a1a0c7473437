"""What a rank compares of each tensor: the right elements, in the right places, and none left out."""

import math
from datetime import timedelta

import pytest
import torch
from ranks import run_on_ranks

from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.train.engine import Engine
from moetrain.train.shards import Shard
from moetrain.verify.shards import HeldShard, errors_of_shards, held_shards, lost_names
from moetrain.verify.spec import VerifySpec


def dense_part(values: list[float], name: str = "w", start: int = 0) -> HeldShard:
    """A part of three elements at most of a vector."""
    value = torch.nn.Parameter(torch.tensor(values))
    shard = Shard(name=name, shape=(4,), offset=(start,), value=value, source=value, decay=True)
    return HeldShard(name, shard, shard.region(shard.local()))


@pytest.mark.parametrize(
    ("values", "start", "error"),
    [
        ([2.0, 3.0], 1, 0.0),
        ([2.0, 3.5], 1, 0.125),
        ([2.0, 3.0], 2, 0.25),  # right values in the wrong place
        ([], 4, 0.0),
        ([math.nan], 0, math.inf),
        ([math.inf], 0, math.inf),
    ],
)
def test_a_part_is_compared_where_it_lies(values: list[float], start: int, error: float) -> None:
    part, whole = dense_part(values, start=start), {"w": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    assert errors_of_shards([part], HeldShard.parameter, whole, {"w": 4.0}) == {"w": error}
    part.shard.value.grad = torch.zeros(len(values))
    at_zero = errors_of_shards([part], HeldShard.gradient, {"w": torch.zeros(4)}, {"w": 0.0})
    assert at_zero == {"w": 0.0}


def test_a_difference_from_nothing_but_zeros_is_infinite() -> None:
    part = dense_part([1e-9])
    assert errors_of_shards([part], HeldShard.parameter, {"w": torch.zeros(4)}, {"w": 0.0}) == {"w": math.inf}


def test_expert_elements_are_found_in_the_whole() -> None:
    """Two owned chunks in one shard; the part is the second and fourth element of the shard."""
    value = torch.nn.Parameter(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    shard = Shard(name="e", shape=(2, 2), offset=(0, 0), value=value, source=value, decay=True, expert_layer=0)
    part = HeldShard("e.w_in", shard, mine_N=torch.tensor([1, 3]), whole_N=torch.tensor([5, 0]))
    whole = torch.tensor([[4.0, 9.0, 9.0], [9.0, 9.0, 2.5]])
    assert errors_of_shards([part], HeldShard.parameter, {"e.w_in": whole}, {"e.w_in": 2.0}) == {"e.w_in": 0.25}
    mark = torch.zeros(2, 3)
    part.mark(mark)
    assert mark.tolist() == [[1, 0, 0], [0, 0, 1]]


def whole_of(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Values that name their tensor and place."""
    first = sum(map(ord, name))
    return first + torch.arange(math.prod(shape), dtype=torch.float64).view(shape)


def compare_all(rank: int, spec: VerifySpec) -> tuple[float, list[str], list[str], int]:
    """The largest error of parameters that were loaded, what is lost with all parts, and with one part missing."""
    run = spec.run
    mesh = FoldedMesh.from_config(run.mesh, spec.ranks)
    groups = MeshGroups.create(mesh, device_type="cpu", timeout=timedelta(seconds=60))
    try:
        engine = Engine(run, groups, "cpu")
        shapes = {name: tuple(value.shape) for name, value in engine.whole.parameters().items()}
        whole = {name: whole_of(name, shape) for name, shape in shapes.items()}
        engine.whole.load(whole)
        parts = held_shards(engine)
        errors = errors_of_shards(parts, HeldShard.parameter, whole, dict.fromkeys(whole, 1.0))
        assert errors.keys() == whole.keys()
        lost = lost_names(parts, shapes)
        # The last rank forgets what it alone has, and one tensor is nobody's.
        fewer = [part for part in parts if not (rank == spec.ranks - 1 and part.name.endswith("experts.w_out"))]
        return max(errors.values()), lost, lost_names(fewer, {**shapes, "nobody": (2,)}), len(parts)
    finally:
        groups.close()


@pytest.mark.dist
@pytest.mark.parametrize(
    ("mesh", "experts"),
    [
        ("dp=2,tp=2", "ep=2,etp=2"),
        ("dp_replicate=2,dp=2", "ep=4"),
        ("dp_replicate=4", "edp=4"),
        ("tp=4", "edp=2,etp=2"),
    ],
)
def test_every_element_is_compared_where_it_lies(mesh: str, experts: str) -> None:
    """Each part of an expert has one owner, so what the last rank forgets is lost."""
    spec = VerifySpec.of(ranks=4, mesh=mesh, experts=experts, dtype="float64")
    for worst, lost, lost_then, num_parts in run_on_ranks(4, compare_all, spec):
        assert worst == 0.0
        assert lost == []
        assert lost_then == ["layers.1.moe.experts.w_out", "layers.2.moe.experts.w_out", "nobody"]
        assert num_parts > 20


def unknown_part(rank: int) -> list[str]:
    return lost_names([dense_part([1.0, 2.0], "v"), dense_part([1.0, 2.0, 3.0, 4.0])], {"w": (4,)})


@pytest.mark.dist
def test_a_tensor_that_the_oracle_does_not_know_is_told() -> None:
    assert run_on_ranks(1, unknown_part) == [["v"]]
