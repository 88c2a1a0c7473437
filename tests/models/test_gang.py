"""A whole model on ranks that share sequences, against one process; ranks are threads."""

from collections.abc import Callable

import pytest
import torch
from models.whole import MODEL, MOE, largest_error, load, one_process_model, whole_values
from torch import Tensor

from moetrain.oracle import random_parameters
from moetrain.sequence import GangShare, PackedBatch, Piece
from moetrain.sequence import ring as ring_module
from moetrain.sequence.ring import Arriving, Ring
from moetrain.sim.ring import run_on_ring

LENGTHS = (23, 1, 6)
Found = tuple[float, float, dict[str, Tensor], int]


class Counting:
    """A ring that counts its exchanges."""

    def __init__(self, ring: Ring) -> None:
        self.rank, self.size, self.exchanges, self._ring = ring.rank, ring.size, 0, ring

    def exchange(self, send: Tensor, receive: Tensor) -> Arriving:
        self.exchanges += 1
        return self._ring.exchange(send, receive)


def documents() -> tuple[Tensor, Tensor]:
    """Tokens and targets of all sequences, one after another."""
    generator = torch.Generator().manual_seed(3)
    token_T, target_T = torch.randint(37, (2, sum(LENGTHS)), generator=generator).unbind()
    target_T[::7] = -1
    return token_T, target_T


def batch_of(place: int, size: int) -> PackedBatch:
    """What one rank of the gang has; everything where it is alone."""
    token_T, target_T = documents()
    begins = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    gang = GangShare(LENGTHS, tuple(range(size)), place)
    pieces = gang.parts().pieces(place)
    mine = torch.cat([torch.arange(begins[i] + start, begins[i] + stop) for i, start, stop in pieces])
    of_batch = tuple(Piece(i, start, stop, 0) for i, start, stop in pieces)
    if size == 1:  # whole documents
        return PackedBatch(token_T, target_T, tuple(Piece(i, 0, n, 0) for i, n in enumerate(LENGTHS)))
    return PackedBatch(token_T[mine], target_T[mine], of_batch, gang)


def step(place: int, size: int, ring: Ring | None, *, recompute: bool) -> Found:
    """Losses and gradients of one rank, and how often it exchanged."""
    network, store, _ = one_process_model(MODEL, MOE, torch.float64, activation_checkpoint=recompute)
    load(network, store, random_parameters(MODEL, MOE.moe, seed=4, dtype=torch.float64))
    counting = None if ring is None else Counting(ring)
    output = network(batch_of(place, size), num_step_tokens=sum(LENGTHS), ring=counting)
    (output.ce_sum + output.aux).backward()
    store.reduce_gradients()
    grads = whole_values(network, store, gradients=True)
    return (
        float(output.ce_sum.detach()),
        float(output.aux.detach()),
        grads,
        0 if counting is None else counting.exchanges,
    )


def together(found: list[Found]) -> dict[str, Tensor]:
    """Gradients and losses, summed over ranks."""
    sums = {name: torch.stack([of_rank[2][name] for of_rank in found]).sum(dim=0) for name in found[0][2]}
    losses = torch.tensor([of_rank[:2] for of_rank in found], dtype=torch.float64).sum(dim=0)
    return sums | {"losses": losses}


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return together([step(0, 1, None, recompute=False)])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_a_gang_learns_what_one_process_does(size: int, recompute: bool, alone: dict[str, Tensor]) -> None:
    found = run_on_ring(size, lambda ring: step(ring.rank, size, ring, recompute=recompute))
    assert largest_error(together(found), alone) < 1e-11
    # Keys and values go round forward and backward, their gradients a step behind: no ring runs again.
    of_a_layer = 2 * (size - 1) + (size - 1)
    assert [of_rank[3] for of_rank in found] == [MODEL.num_layers * of_a_layer] * size


def kept_twice(name: str, make: Callable[[], object]) -> object:
    """Once, but the ring runs again whatever is kept."""
    return make()


def test_positions_of_parts_are_those_of_the_whole(alone: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation: each rank counts its own tokens from 0."""
    monkeypatch.setattr(PackedBatch, "positions", lambda self: torch.arange(self.num_tokens))
    found = run_on_ring(2, lambda ring: step(ring.rank, 2, ring, recompute=False))
    assert largest_error(together(found), alone) > 1e-3


def test_a_ring_that_runs_again_would_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = ring_module.ring_attention

    def forgetful(*args: Tensor, **named: object) -> Tensor:
        return usual(*args, **{**named, "once": kept_twice})  # type: ignore[arg-type]

    monkeypatch.setattr("moetrain.models.attention.ring_attention", forgetful)
    found = run_on_ring(2, lambda ring: step(ring.rank, 2, ring, recompute=True))
    assert [of_rank[3] for of_rank in found] == [MODEL.num_layers * 4] * 2
