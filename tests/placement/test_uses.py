"""Uses of experts under placements and owners that move, against dense experts; integers, so every bit counts.

Each rank runs micro-batches of two layers as a model does: residual path, a linear "attention", experts. What a rank
computes is decided by the placement alone; a rank may have no tokens, no experts and own nothing.
"""

import itertools
import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from known import grad_of
from placement.placements import sent_chunks, server_of
from ranks import run_on_ranks
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moetrain.mesh.traffic import TrafficCounter
from moetrain.placement.chunks import ExpertShape
from moetrain.placement.current import CurrentPlacement
from moetrain.placement.held import missing_seats
from moetrain.placement.placement import Affinity, Placement
from moetrain.placement.sparse import SparseCollectives
from moetrain.placement.store import ExpertStore
from moetrain.placement.use import WeightUse

SHAPE = ExpertShape(width=6, hidden=4, gated=False)
ALL = torch.arange(SHAPE.num_parameters)
EXPERTS, LAYERS, ROUNDS, STEPS = 5, (0, 2), 3, 3
LENGTH = 128  # elements of a chunk


def initial(layer: int, expert: int, index_N: Tensor) -> Tensor:
    return ((index_N * 7 + 5 * expert + 3 * layer) % 3 - 1).float()


def draw_placement(draw: random.Random, num_groups: int, num_shards: int, owners: list[int] | None) -> Placement:
    """Random holders beside the owner, and owners if none are given; the last group owns and holds nothing at first."""
    groups = range(num_groups - 1 if owners is None and num_groups > 1 else num_groups)
    owners = owners or [draw.choice(groups) for _ in range(EXPERTS)]
    holders = [sorted({owner, *draw.sample(groups, draw.randint(0, len(groups)))}) for owner in owners]
    return Placement.of(
        num_groups,
        [[owner] for owner in owners],
        holders,
        [[draw.randint(1, 4) for _ in held] for held in holders],
        affinity=Affinity(3, 2, 1),
        domain_size=2,
        num_shards=num_shards,
    )


def tokens(layer: int, source: int, expert: int, round_idx: int) -> Tensor:
    """[0, 1 or 2 tokens, D] of group ``source`` for an expert; expert 3 is chosen by nobody."""
    count = 0 if expert == 3 else (source + 2 * expert + round_idx + layer) % 3
    return ((torch.arange(count * SHAPE.width) + source + 3 * expert + round_idx) % 3 - 1).view(count, SHAPE.width)


def run_expert(x_TD: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    return (x_TD @ w_in[0].T) @ w_out.T


class Model:
    """Two layers of one rank: ``run`` is a micro-batch forward."""

    def __init__(self, store: ExpertStore, rank: int, *, recompute: bool) -> None:
        self.store = store
        self.rank = rank
        self.recompute = recompute
        self.better: dict[int, Placement] = {}  # layers that go on under another placement once they have begun

    def run(self, round_idx: int) -> Tensor:
        # A token goes through to keep the residual path alive; a rank may well have none.
        x_TD = torch.ones(self.rank % 2, SHAPE.width, requires_grad=True)
        total = x_TD.sum() * 0
        for layer in LAYERS:
            use = self.store.use(layer, recomputes=self.recompute)
            if self.recompute:
                x_TD, part = checkpoint(self._block, x_TD, layer, round_idx, use, use_reentrant=False)
            else:
                x_TD, part = self._block(x_TD, layer, round_idx, use)
            total = total + part
        return total + x_TD.sum()

    def _block(self, x_TD: Tensor, layer: int, round_idx: int, use: WeightUse) -> tuple[Tensor, Tensor]:
        x_TD = use.before_experts(use.begin(x_TD) * 2)
        if layer in self.better:
            self.store.replan(use, self.better.pop(layer))
        weights, placement = use.weights(), use.placement
        group = self.rank // placement.num_shards

        def run() -> Tensor:
            part = x_TD.sum() * 0
            for slot, expert in zip(weights.slot_E.tolist(), weights.experts, strict=True):
                for source in range(placement.num_groups):
                    if server_of(placement, source, expert) == group:
                        mine_TD = tokens(layer, source, expert, round_idx).float()
                        part = part + run_expert(mine_TD, weights.w_in[slot], weights.w_out[slot]).sum()
            return part

        part = use.run(run)
        return use.after_experts(x_TD + 1), part


def dense_gradient(layer: int, expert: int, flat: Tensor, num_groups: int) -> Tensor:
    flat = flat.clone().requires_grad_()
    w_in, w_out = SHAPE.split(flat)
    for source, round_idx in itertools.product(range(num_groups), range(ROUNDS)):
        run_expert(tokens(layer, source, expert, round_idx).double(), w_in, w_out).sum().backward()
    return grad_of(flat)


def train(rank: int, seed: int, mutation: str, options: dict[str, Any]) -> tuple[TrafficCounter, dict[str, int]]:
    """A few integer steps; returns what was sent by this rank, and how many chunks all of them should have sent."""
    shards = options.get("num_shards", 1)
    draw, num_groups = random.Random(seed), dist.get_world_size() // shards
    counter, bound = TrafficCounter(ranks_per_node=2), {"gather": 0, "scatter": 0, "move": 0}
    placed = {layer: CurrentPlacement(draw_placement(draw, num_groups, shards, None)) for layer in LAYERS}
    collectives = SparseCollectives(dist.group.WORLD, rank, counter, ranks_per_node=options.get("ranks_per_node"))
    types = {"compute_dtype": torch.float32, "master_dtype": torch.float32}
    store = ExpertStore(SHAPE, placed, collectives, rank, **types, device="cpu")
    store.keep_weights(options["keeps"])
    store.initialise(initial)
    dense = {(layer, e): initial(layer, e, ALL).double() for layer in LAYERS for e in range(EXPERTS)}
    model = Model(store, rank, recompute=options["recompute"])
    moments = {layer: store.owned_parameters()[layer].detach() * 2 for layer in LAYERS}
    for step in range(STEPS):
        store.zero_grad()
        for round_idx in range(ROUNDS):
            if round_idx > 0 or step > 0:
                for one in placed.values():
                    owners = one.now.owner_ES.flatten().tolist()
                    one.set(draw_placement(draw, num_groups, shards, owners))
            store.reduces = mutation != "gradients late"
            for layer in LAYERS:
                now = placed[layer].now
                bound["gather"] += sent_chunks(now)
                if options.get("replans"):
                    owners = now.owner_ES.flatten().tolist()
                    model.better[layer] = draw_placement(draw, num_groups, shards, owners)
                    bound["gather"] += sent_chunks(missing_seats(now, model.better[layer]))
                    now = model.better[layer]
                bound["gather"] += 0 if layer in options["keeps"] else sent_chunks(now)
                bound["scatter"] += sent_chunks(now)
            if mutation == "stale plan" and rank == 0 and round_idx == 1:
                for one in placed.values():  # this rank alone goes on under another plan
                    owners = one.now.owner_ES.flatten().tolist()
                    one.set(Placement.of(num_groups, [[e] for e in owners], [[e] for e in owners], num_shards=shards))
            model.run(round_idx).backward()
        store.reduce_gradients()
        for (layer, expert), flat in dense.items():
            gradient = dense_gradient(layer, expert, flat, num_groups)
            whole = store.full_expert(layer, {one: grad_of(p) for one, p in store.owned_parameters().items()})[expert]
            assert torch.equal(whole.double(), gradient), (step, layer, expert)
            dense[layer, expert] = flat - (gradient % 3 - 1)
        with torch.no_grad():
            for layer, parameter in store.owned_parameters().items():
                parameter.sub_(grad_of(parameter) % 3 - 1)
                moments[layer] = parameter.detach() * 2
        store.advance_epoch()
        after = {layer: draw_placement(draw, num_groups, shards, None) for layer in LAYERS[step % 2 :]}
        changed = {layer: after[layer].owner_ES != placed[layer].now.owner_ES for layer in after}
        bound["move"] += sum(2 * int(one.sum()) * shards for one in changed.values())  # masters and moments
        objects = dict(store.owned_parameters())
        moved = store.move_owners(after, {layer: [moments[layer]] for layer in after})
        assert all(store.owned_parameters()[layer] is objects[layer] for layer in LAYERS)
        moments |= {layer: tensors[0] for layer, tensors in moved.items()}
        if mutation == "swap owners" and store.owned_parameters()[LAYERS[0]].shape[0] > 1:
            store.owned_parameters()[LAYERS[0]].data = store.owned_parameters()[LAYERS[0]].detach().flip(0)
        for layer in LAYERS:
            masters, doubled = store.full_expert(layer), store.full_expert(layer, moments)
            for expert in range(EXPERTS):
                assert torch.equal(masters[expert].double(), dense[layer, expert]), "masters are bit-equal after a move"
                assert torch.equal(doubled[expert].double(), dense[layer, expert] * 2), "so are moments"
    return counter, bound


CASES: dict[str, dict[str, Any]] = {
    "kept": {"keeps": LAYERS, "recompute": False},
    "gathered again": {"keeps": (), "recompute": False},
    "one layer of each": {"keeps": (2,), "recompute": False},
    "recomputed": {"keeps": LAYERS, "recompute": True},
    "recomputed, gathered again": {"keeps": (), "recompute": True},
    "two levels": {"keeps": (), "recompute": False, "ranks_per_node": 2},
    "planned again": {"keeps": LAYERS, "recompute": False, "replans": True},
    "planned again, recomputed, gathered again": {"keeps": (), "recompute": True, "replans": True},
}


def check_bytes(found: list[tuple[TrafficCounter, dict[str, int]]]) -> None:
    for purpose, chunks in found[0][1].items():
        assert sum(counter.bytes.get(purpose, 0) for counter, _ in found) == chunks * LENGTH * 4, purpose


@pytest.mark.dist
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_moving_plans_and_owners_train_like_dense_experts(world_size: int, case: str) -> None:
    for seed in range(2):
        check_bytes(run_on_ranks(world_size, train, seed, "none", CASES[case]))


@pytest.mark.dist
def test_one_rank_and_shards() -> None:
    check_bytes(run_on_ranks(1, train, 0, "none", CASES["gathered again"]))
    check_bytes(run_on_ranks(4, train, 1, "none", CASES["gathered again"] | {"num_shards": 2}))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_eight_ranks(case: str) -> None:
    for seed in range(3):
        check_bytes(run_on_ranks(8, train, seed, "none", CASES[case]))


@pytest.mark.dist
@pytest.mark.parametrize("mutation", ["stale plan", "swap owners"])
def test_the_checks_notice(mutation: str) -> None:
    with pytest.raises(Exception, match=r"(?s)."):
        run_on_ranks(2, train, 0, mutation, CASES["kept"])


@pytest.mark.dist
def test_gradients_that_start_home_late_are_the_same_but_not_while_plans_move() -> None:
    """``reduces`` off: gradients wait for ``reduce_gradients``; the sums are the same, the placements pile up."""
    check_bytes(run_on_ranks(2, train, 0, "gradients late", CASES["kept"]))


def buffers_body(rank: int, keeps: tuple[int, ...]) -> list[int]:
    """Bytes of compute weights that the graph keeps between a forward pass and its backward pass."""
    placement = Placement.of(2, [[0], [1]], [[0, 1], [0, 1]])
    store = ExpertStore(
        SHAPE,
        dict.fromkeys(LAYERS, placement),
        SparseCollectives(dist.group.WORLD, rank),
        rank,
        compute_dtype=torch.float32,
        master_dtype=torch.float32,
        device="cpu",
    )
    store.initialise(initial)
    store.keep_weights(keeps)
    model, found = Model(store, rank, recompute=False), []
    for _ in range(3):
        loss = model.run(0)
        found.append(sum(held.is_here for entry in store._layers.values() for held in entry.held.values()))
        loss.backward()
        store.zero_grad()
        store.advance_epoch()
    return found


@pytest.mark.dist
def test_weights_that_are_not_kept_are_given_back() -> None:
    assert run_on_ranks(2, buffers_body, LAYERS) == [[2, 2, 2]] * 2
    assert run_on_ranks(2, buffers_body, ()) == [[0, 0, 0]] * 2
    assert run_on_ranks(2, buffers_body, (2,)) == [[1, 1, 1]] * 2
