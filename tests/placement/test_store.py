"""The expert store against dense experts in one process, with integers that float arithmetic keeps exact."""

import itertools

import pytest
import torch
import torch.distributed as dist
from known import grad_of
from placement.placements import owners_of, random_placement, replicated_everywhere, sent_chunks, server_of
from ranks import run_on_ranks
from torch import Tensor

from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.mesh.traffic import TrafficCounter
from moetrain.placement.chunks import ExpertShape
from moetrain.placement.held import ExpertWeights
from moetrain.placement.placement import Placement
from moetrain.placement.sparse import SparseCollectives
from moetrain.placement.static import plan_static
from moetrain.placement.store import ExpertStore

SHAPE = ExpertShape(width=12, hidden=10, gated=True)  # 360 parameters: three slices of 128, the last one short


ALL = torch.arange(SHAPE.num_parameters)


def initial(layer: int, expert: int, index_N: Tensor) -> Tensor:
    return ((index_N * 7 + 5 * expert + 3 * layer) % 5 - 2).float()


def tokens(layer: int, source: int, expert: int, micro: int) -> Tensor:
    """Integer tokens of one source for one expert: none, one or two of them."""
    count = (source + 2 * expert + micro + layer) % 3
    return ((torch.arange(count * SHAPE.width) + source + 3 * expert + micro) % 3 - 1).view(count, SHAPE.width)


def identity_expert(x_TD: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    return (x_TD @ w_in.sum(0).T) @ w_out.T


def make_store(
    rank: int, placements: dict[int, Placement], dtype: torch.dtype, counter: TrafficCounter | None = None
) -> ExpertStore:
    master = torch.promote_types(dtype, torch.float32)
    collectives = SparseCollectives(dist.group.WORLD, rank, counter)
    store = ExpertStore(SHAPE, placements, collectives, rank, compute_dtype=dtype, master_dtype=master, device="cpu")
    store.initialise(initial)
    return store


def dense_gradient(layer: int, expert: int, flat: Tensor, num_ranks: int) -> Tensor:
    """The whole batch through one expert in float64."""
    flat = flat.clone().requires_grad_()
    w_in, w_out = SHAPE.split(flat)
    for source, micro in itertools.product(range(num_ranks), range(2)):
        x_TD = tokens(layer, source, expert, micro).double()
        identity_expert(x_TD, w_in, w_out).sum().backward()
    return grad_of(flat)


def run_micro_batch(rank: int, layer: int, micro: int, placement: Placement, weights: ExpertWeights) -> None:
    """Forward and backward for all tokens that come to this rank."""
    total = weights.w_in.sum() * 0 + weights.w_out.sum() * 0  # a rank without tokens stays in the graph
    for slot, expert in zip(weights.slot_E.tolist(), weights.experts, strict=True):
        for source in range(placement.num_ranks):
            if server_of(placement, source, expert) == rank:
                x_TD = tokens(layer, source, expert, micro).to(weights.w_in.dtype)
                total = total + identity_expert(x_TD, weights.w_in[slot], weights.w_out[slot]).sum()
    total.backward()


def train(rank: int, placements: dict[int, Placement], dtype: torch.dtype, mutation: str) -> TrafficCounter:
    """Two integer SGD steps of two micro-batches; masters and gradients equal the dense run bit for bit."""
    counter = TrafficCounter()
    store = make_store(rank, placements, dtype, counter)
    dense = {
        (layer, expert): initial(layer, expert, ALL).double()
        for layer, placement in placements.items()
        for expert in range(placement.num_experts)
    }
    for _ in range(2):
        store.zero_grad()
        for micro, layer in itertools.product(range(2), reversed(store.layers)):
            weights = store.materialise(layer)
            for slot, expert in zip(weights.slot_E.tolist(), weights.experts, strict=True):
                w_in, w_out = SHAPE.split(dense[layer, expert].to(dtype))
                assert torch.equal(weights.w_in[slot], w_in)
                assert torch.equal(weights.w_out[slot], w_out)
            run_micro_batch(rank, layer, micro, placements[layer], weights)
        if mutation == "averaged":
            for layer in store.layers:
                (held,) = store._layer(layer).held.values()
                assert held._grad_HL is not None
                held._grad_HL /= placements[layer].num_ranks
        if mutation == "a replica dropped" and rank == 0:
            store.zero_grad()
        store.reduce_gradients()
        for key in dense:
            gradient = dense_gradient(*key, dense[key], placements[key[0]].num_ranks)
            check_owned(store, *key, gradient, "grad")
            dense[key] -= (gradient % 3) - 1  # any step that keeps the numbers small
        for parameter in store.owned_parameters().values():
            with torch.no_grad():
                parameter.sub_((grad_of(parameter) % 3) - 1)
        if mutation != "epoch forgotten":
            store.advance_epoch()
    for (layer, expert), flat in dense.items():
        assert torch.equal(store.full_expert(layer)[expert].double(), flat)
    return counter


def check_owned(store: ExpertStore, layer: int, expert: int, flat: Tensor, what: str) -> None:
    parameter = store.owned_parameters()[layer]
    tensor = grad_of(parameter) if what == "grad" else parameter
    for owned_expert, _, row, start, stop in store.owned_chunks(layer):
        if owned_expert == expert:
            assert torch.equal(tensor[row, : stop - start].double(), flat[start:stop])
            assert not tensor[row, stop - start :].any() or what != "grad", "padding gets no gradient"


def two_layers(seed: int, world_size: int, num_slices: int) -> dict[int, Placement]:
    idle = seed % world_size if seed % 2 else None
    return {
        1: random_placement(seed, world_size, 2 + seed, num_slices, idle=idle),
        3: random_placement(seed + 50, world_size, 1 + seed % 2, num_slices),
    }


@pytest.mark.dist
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_placements_train_like_dense_experts(world_size: int, dtype: torch.dtype) -> None:
    for seed, num_slices in ((0, 1), (1, 3), (2, 2), (3, 1)):
        placements = two_layers(seed, world_size, num_slices)
        counters = run_on_ranks(world_size, train, placements, dtype, "none")
        length = {1: 384, 2: 256, 3: 128}[num_slices]
        bound = 2 * sum(sent_chunks(placement) for placement in placements.values()) * length
        for purpose, item_bytes in (("gather", dtype.itemsize), ("scatter", dtype.itemsize)):
            assert sum(counter.bytes.get(purpose, 0) for counter in counters) == bound * item_bytes


@pytest.mark.dist
@pytest.mark.parametrize(
    ("edp", "ep", "num_experts"), [(1, 2, 3), (2, 1, 2), (2, 2, 5), (1, 3, 2), (3, 1, 1), (1, 4, 3)]
)
def test_static_placements_train_like_dense_experts(edp: int, ep: int, num_experts: int) -> None:
    placement = plan_static(FoldedMesh(dp_shard=edp * ep, edp=edp, ep=ep), num_experts)
    run_on_ranks(edp * ep, train, {0: placement}, torch.float32, "none")


@pytest.mark.dist
@pytest.mark.parametrize("mutation", ["averaged", "a replica dropped", "epoch forgotten"])
def test_the_checks_notice(mutation: str) -> None:
    placement = plan_static(FoldedMesh(dp_shard=2, edp=2), 3)
    with pytest.raises(AssertionError):
        run_on_ranks(2, train, {0: placement}, torch.float32, mutation)


def train_in_ep_group(rank: int) -> bool:
    """Mutation: collectives over ep in place of the pool, so that edp replicas never meet."""
    mesh = FoldedMesh(dp_shard=4, edp=2, ep=2)
    groups = MeshGroups.create(mesh)
    try:
        placement = plan_static(FoldedMesh(dp_shard=2, ep=2), 2)
        collectives = SparseCollectives(groups.group("ep"), groups.group_rank("ep"))
        store = ExpertStore(
            SHAPE,
            {0: placement},
            collectives,
            groups.group_rank("ep"),
            compute_dtype=torch.float32,
            master_dtype=torch.float32,
            device="cpu",
        )
        store.initialise(initial)
        (store.materialise(0).w_in.sum() * (rank + 1)).backward()
        store.reduce_gradients()
        return bool((grad_of(store.owned_parameters()[0])[:, 0] == 1 + 2 + 3 + 4).all())
    finally:
        groups.close()


@pytest.mark.dist
def test_the_wrong_group_is_noticed() -> None:
    assert run_on_ranks(4, train_in_ep_group) == [False] * 4
    with pytest.raises(ValueError, match=r"layer 0 is placed on 4 ranks .* but the collectives join 2 ranks"):
        run_on_ranks(2, make_store, {0: plan_static(FoldedMesh(dp_shard=4, ep=4), 4)}, torch.float32)


def low_precision(rank: int, placement: Placement) -> tuple[torch.dtype, torch.dtype, float, dict[str, int]]:
    """256 + 1 + 1: bfloat16 would lose both ones, in accumulation and on the wire."""
    counter = TrafficCounter()
    store = make_store(rank, {0: placement}, torch.bfloat16, counter)
    weights = store.materialise(0)
    for scale in (256.0, 1.0, 1.0):
        (weights.w_in.sum() * scale + weights.w_out.sum() * scale).backward()
    store.reduce_gradients()
    grad = grad_of(store.owned_parameters()[0])
    return weights.w_in.dtype, grad.dtype, float(grad.max()), dict(counter.bytes)


@pytest.mark.dist
def test_gradients_of_bfloat16_weights_add_up_in_float32() -> None:
    placement = plan_static(FoldedMesh(dp_shard=2, edp=2), 1)
    for compute, grad, largest, traffic in run_on_ranks(2, low_precision, placement):
        assert (compute, grad, largest) == (torch.bfloat16, torch.float32, 2 * 258.0)
        assert traffic == {"gather": 256 * 2, "scatter": 256 * 4}


def inspect(rank: int, placement: Placement) -> tuple[dict[int, Tensor], dict[int, Tensor], dict[str, int]]:
    counter = TrafficCounter()
    store = make_store(rank, {2: placement}, torch.float32, counter)
    owned = store.owned_parameters()[2]
    marked = {2: torch.full_like(owned, float(rank))}
    return store.full_expert(2), store.full_expert(2, marked), dict(counter.bytes)


@pytest.mark.dist
def test_every_rank_can_see_whole_experts() -> None:
    placement = random_placement(9, 3, 4, 3)
    for full, owners, traffic in run_on_ranks(3, inspect, placement):
        assert list(full) == [0, 1, 2, 3]
        for expert in range(4):
            assert torch.equal(full[expert], initial(2, expert, ALL))
            expected = [owners_of(placement)[expert][idx // 128] for idx in range(SHAPE.num_parameters)]
            assert owners[expert].tolist() == expected
        assert "gather" not in traffic, "looking is not counted as training traffic"


def alone(placement: Placement | None = None, *, device: str = "cpu", **changes: torch.dtype) -> ExpertStore:
    placement = placement or plan_static(FoldedMesh(), 2)
    dtypes = {"compute_dtype": torch.float32, "master_dtype": torch.float32} | changes
    return ExpertStore(SHAPE, {0: placement}, None, 0, device=device, **dtypes)


def test_weights_are_aligned_and_strided(device: str) -> None:
    store = alone(device=device, compute_dtype=torch.bfloat16)
    weights = store.materialise(0)
    for tensor, shape in ((weights.w_in, SHAPE.w_in_shape), (weights.w_out, SHAPE.w_out_shape)):
        assert tensor.requires_grad
        assert tuple(tensor.shape) == (2, *shape)
        assert tensor[0].is_contiguous()
        assert tensor.stride(0) == 384
        assert tensor.stride(0) * tensor.element_size() % 256 == 0
    assert weights.slot_E.dtype == torch.int32
    assert weights.slot_E.tolist() == [0, 1]


def test_evaluation_first_leaves_weights_that_can_train(device: str) -> None:
    store = alone(device=device)
    store.initialise(initial)
    with torch.inference_mode():
        store.materialise(0)
    store.advance_epoch()
    with torch.no_grad():
        assert not store.materialise(0).w_out.requires_grad
    store.materialise(0).w_out.sum().backward()
    store.reduce_gradients()
    grad = grad_of(store.owned_parameters()[0])
    assert grad[0, SHAPE.w_in_numel : SHAPE.num_parameters].eq(1).all()
    assert grad.sum() == 2 * SHAPE.width * SHAPE.hidden


def test_layers_that_share_a_placement_share_its_plan() -> None:
    shared, other = plan_static(FoldedMesh(), 2), plan_static(FoldedMesh(), 3)
    placements = {0: shared, 1: other, 2: shared, 5: plan_static(FoldedMesh(), 2)}
    store = ExpertStore(
        SHAPE, placements, None, 0, compute_dtype=torch.float32, master_dtype=torch.float32, device="cpu"
    )
    assert store.collectives.num_plans() == 2
    assert [len(param) for param in store.owned_parameters().values()] == [2, 3, 2, 2]
    store.initialise(initial)
    assert [store.materialise(layer).experts for layer in store.layers] == [(0, 1), (0, 1, 2), (0, 1), (0, 1)]


def test_epochs_say_when_weights_changed(device: str) -> None:
    store = alone(device=device)
    assert store.epoch == 0
    store.initialise(initial)
    assert store.epoch == 1
    weights = store.materialise(0)
    with torch.no_grad():
        store.owned_parameters()[0].fill_(7)
    assert not store.materialise(0).w_in.eq(7).any()
    store.advance_epoch()
    assert store.materialise(0).w_in.eq(7).all()
    assert weights.w_in.data_ptr() == store.materialise(0).w_in.data_ptr(), "in the memory that was there"


def test_gradients_go_home_once_and_can_be_dropped(device: str) -> None:
    store = alone(device=device)
    store.reduce_gradients()
    assert not grad_of(store.owned_parameters()[0]).any(), "zeros where nothing was computed"
    store.materialise(0).w_in.sum().backward()
    store.reduce_gradients()
    for _ in range(2):  # the second time nothing is left to reduce
        assert grad_of(store.owned_parameters()[0]).sum() == 2 * SHAPE.w_in_numel
        store.reduce_gradients()
    store.materialise(0).w_in.sum().backward()
    store.zero_grad()
    assert store.owned_parameters()[0].grad is None
    store.reduce_gradients()
    assert not grad_of(store.owned_parameters()[0]).any()


def test_errors() -> None:
    store = alone()
    with pytest.raises(ValueError, match=r"layer 5 has no experts here; layers with experts are \[0\]"):
        store.materialise(5)
    moved = replicated_everywhere(plan_static(FoldedMesh(), 3))
    with pytest.raises(ValueError, match="layer 0 must have the owners that the store has now; plan again"):
        store.materialise(0, moved)
    store.materialise(0, store.placement(0)).w_in.sum().backward()
    with pytest.raises(RuntimeError, match="layer 0 has gradients on their way to its present owners; call reduce"):
        store.move_owners({0: store.placement(0)}, {0: []})
    with pytest.raises(ValueError, match=r"layer 0, expert 0 needs 360 values from 0 on, got .* shape \[3\]"):
        store.initialise(lambda *_: torch.zeros(3))
    with pytest.raises(ValueError, match=r"needs a tensor like the owned parameter, \[2, 384\], got \[1, 384\]"):
        store.full_expert(0, {0: torch.zeros(1, 384)})
    with pytest.raises(
        ValueError, match=r"master_dtype must be at least torch.float64 with compute_dtype torch.float64"
    ):
        alone(compute_dtype=torch.float64)
    with pytest.raises(ValueError, match=r"got torch.bfloat16; use torch.float32"):
        alone(master_dtype=torch.bfloat16, compute_dtype=torch.bfloat16)
