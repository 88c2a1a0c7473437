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


class Training:
    """One rank's few integer steps under placements and owners that are drawn, beside dense experts.

    ``bound`` counts the chunks that all ranks together should have sent.
    """

    def __init__(self, rank: int, seed: int, options: dict[str, Any]) -> None:
        self.options = options
        self.shards = options.get("num_shards", 1)
        self.draw = random.Random(seed)
        self.seen: set[tuple[int, str]] = set()  # seats of this step, by layer
        self.num_groups = dist.get_world_size() // self.shards
        self.counter, self.bound = TrafficCounter(ranks_per_node=2), {"gather": 0, "scatter": 0, "move": 0}
        self.placed = {layer: CurrentPlacement(self.drawn()) for layer in LAYERS}
        nodes = options.get("ranks_per_node")
        collectives = SparseCollectives(dist.group.WORLD, rank, self.counter, ranks_per_node=nodes)
        types = {"compute_dtype": torch.float32, "master_dtype": torch.float32}
        self.store = ExpertStore(SHAPE, self.placed, collectives, rank, **types, device="cpu")
        self.store.keep_weights(options["keeps"])
        self.store.initialise(initial)
        self.dense = {(layer, e): initial(layer, e, ALL).double() for layer in LAYERS for e in range(EXPERTS)}
        self.model = Model(self.store, rank, recompute=options["recompute"])
        self.moments = {layer: self.store.owned_parameters()[layer].detach() * 2 for layer in LAYERS}

    def drawn(self) -> Placement:
        """Any owners, any holders."""
        return draw_placement(self.draw, self.num_groups, self.shards, None)

    def drawn_like(self, layer: int) -> Placement:
        """The owners that a layer has, and other seats than it had in this step: those might not be sent again."""
        owners = self.placed[layer].now.owner_ES.flatten().tolist()
        while True:
            placement = draw_placement(self.draw, self.num_groups, self.shards, owners)
            if self.num_groups == 1 or (layer, placement.seats_hash()) not in self.seen:
                self.seen.add((layer, placement.seats_hash()))
                return placement

    def run_round(self, step: int, round_idx: int) -> None:
        """A micro-batch forward and backward, under new placements but for the very first."""
        for layer, one in self.placed.items():
            if round_idx > 0 or step > 0:
                one.set(self.drawn_like(layer))
            now = one.now
            self.bound["gather"] += sent_chunks(now)
            if self.options.get("replans"):
                better = self.model.better[layer] = self.drawn_like(layer)
                self.bound["gather"] += sent_chunks(missing_seats(now, better))
                now = better
            self.bound["gather"] += 0 if layer in self.options["keeps"] else sent_chunks(now)
            self.bound["scatter"] += sent_chunks(now)
        self.model.run(round_idx).backward()

    def update(self, step: int) -> None:
        """Compare gradients, and step in small whole numbers."""
        self.store.reduce_gradients()
        grads = {layer: grad_of(parameter) for layer, parameter in self.store.owned_parameters().items()}
        for (layer, expert), flat in self.dense.items():
            gradient = dense_gradient(layer, expert, flat, self.num_groups)
            assert torch.equal(self.store.full_expert(layer, grads)[expert].double(), gradient), (step, layer, expert)
            self.dense[layer, expert] = flat - (gradient % 3 - 1)
        with torch.no_grad():
            for layer, parameter in self.store.owned_parameters().items():
                parameter.sub_(grads[layer] % 3 - 1)
                self.moments[layer] = parameter.detach() * 2
        self.store.advance_epoch()

    def move(self, layers: tuple[int, ...]) -> None:
        """Give the experts of some layers owners that are drawn."""
        after = {layer: self.drawn() for layer in layers}
        changed = [(after[layer].owner_ES != self.placed[layer].now.owner_ES).sum() for layer in layers]
        self.bound["move"] += sum(2 * int(count) * self.shards for count in changed)  # masters and moments
        objects = dict(self.store.owned_parameters())
        moved = self.store.move_owners(after, {layer: [self.moments[layer]] for layer in after})
        assert all(self.store.owned_parameters()[layer] is objects[layer] for layer in LAYERS)
        self.moments |= {layer: tensors[0] for layer, tensors in moved.items()}

    def check_owned(self) -> None:
        """Masters and moments are those of dense experts."""
        for layer in LAYERS:
            masters, doubled = self.store.full_expert(layer), self.store.full_expert(layer, self.moments)
            for expert in range(EXPERTS):
                flat = self.dense[layer, expert]
                assert torch.equal(masters[expert].double(), flat), "masters are bit-equal after a move"
                assert torch.equal(doubled[expert].double(), flat * 2), "so are moments"


def train(rank: int, seed: int, mutation: str, options: dict[str, Any]) -> tuple[TrafficCounter, dict[str, int]]:
    """A few steps; returns what was sent by this rank, and how many chunks all of them should have sent."""
    training = Training(rank, seed, options)
    for step in range(STEPS):
        training.seen = {(layer, one.now.seats_hash()) for layer, one in training.placed.items()}
        training.store.zero_grad()
        training.store.reduces = mutation != "gradients late"
        for round_idx in range(ROUNDS):
            training.run_round(step, round_idx)
        training.update(step)
        training.move(LAYERS[step % 2 :])
        owned = training.store.owned_parameters()[LAYERS[0]]
        if mutation == "swap owners" and len(owned) > 1:
            owned.data = owned.detach().flip(0)
        training.check_owned()
    return training.counter, training.bound


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
def test_experts_that_change_places_in_a_move_are_noticed() -> None:
    with pytest.raises(AssertionError, match="masters are bit-equal after a move"):
        run_on_ranks(2, train, 0, "swap owners", CASES["kept"])


@pytest.mark.dist
def test_gradients_that_wait_for_the_end_of_the_step_are_the_same() -> None:
    """``reduces`` off: they wait for ``reduce_gradients``, and the placements that they belong to with them."""
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
