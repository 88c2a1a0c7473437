"""Activations that wait on the host change no bit, and come back in time."""

import gc
from collections.abc import Callable

import pytest
import torch
from models.whole import MODEL, MOE, load, make_batch, one_process_model, whole_values
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moetrain.oracle import random_parameters
from moetrain.sequence import PackedBatch
from moetrain.sequence.host_copies import Copying, LateCopies
from moetrain.sequence.offload import LEAST_BYTES, Offload

ROWS = [[70, 30], [100], [1, 99]]


class Counting(LateCopies):
    """Copies that are counted; with ``lazy`` nobody waits."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.copied: list[tuple[int, ...]] = []

    def start(self, target: Tensor, source: Tensor) -> Copying:
        self.copied.append(tuple(source.shape))
        return super().start(target, source)


def step(
    ratio: float,
    dtype: torch.dtype = torch.float32,
    *,
    recompute: bool = False,
    seed: int = 0,
    batch: PackedBatch | None = None,
    spoil: Callable[[Offload], None] | None = None,
) -> tuple[dict[str, Tensor], Offload, Counting]:
    """All gradients and the losses of a forward and a backward pass."""
    network, store, _ = one_process_model(MODEL, MOE, dtype, activation_checkpoint=recompute)
    load(network, store, random_parameters(MODEL, MOE.moe, seed=4, dtype=dtype))
    copies = Counting(seed)
    offload = Offload(network, list(network.layers), copies, store.is_weight)
    if spoil is not None:
        spoil(offload)
    with offload.share(ratio):
        output = network(make_batch(ROWS) if batch is None else batch, num_step_tokens=300)
    (output.ce_sum + output.aux).backward()
    store.reduce_gradients()
    found = whole_values(network, store, gradients=True)
    return {**found, "ce": output.ce_sum.detach(), "aux": output.aux.detach()}, offload, copies


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_bit_changes(dtype: torch.dtype, recompute: bool) -> None:
    want, _, none = step(0.0, dtype, recompute=recompute)
    assert not none.copied
    for ratio, seed in ((0.25, 1), (0.5, 2), (1.0, 3)):
        found, offload, copies = step(ratio, dtype, recompute=recompute, seed=seed)
        assert all(torch.equal(found[name], value) for name, value in want.items())
        assert copies.copied
        assert offload.taken_counts().num_bytes > 0
        assert offload.taken_counts().num_bytes == 0


def test_what_is_used_before_it_is_back_is_noticed() -> None:
    """The mutation: nobody waits."""

    def hasty(offload: Offload) -> None:
        offload.wait_for = lambda copying: None  # type: ignore[method-assign]

    found, _, _ = step(1.0, spoil=hasty)
    assert any(value.isnan().any() for value in found.values())


def test_half_of_the_rows_are_half_of_the_bytes_and_most_of_what_is_saved_goes() -> None:
    _, whole, copies = step(1.0)
    _, half, _ = step(0.5)
    assert half.counts.num_bytes == pytest.approx(whole.counts.num_bytes / 2, rel=0.02)
    assert len(copies.copied) % 2 == 0, "each goes and comes once"
    tokens = sum(map(sum, ROWS))
    per_layer = whole.counts.num_bytes / MODEL.num_layers / tokens / 4
    assert per_layer > 4 * MODEL.width, "queries, keys, values, norms' and projections' inputs"


def test_parameters_and_weights_of_experts_stay() -> None:
    network, store, _ = one_process_model(MODEL, MOE, torch.float32)
    load(network, store, random_parameters(MODEL, MOE.moe, seed=4, dtype=torch.float32))
    kept: list[Tensor] = []

    class Noting(LateCopies):
        def start(self, target: Tensor, source: Tensor) -> Copying:
            kept.append(source)
            return super().start(target, source)

    offload = Offload(network, list(network.layers), Noting(), store.is_weight)
    with offload.share(1.0):
        output = network(make_batch(ROWS), num_step_tokens=300)
    moved = {source.untyped_storage().data_ptr() for source in kept}
    stay = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    assert moved
    assert not moved & stay
    assert not any(store.is_weight(source) for source in kept)
    del output


class Twice(nn.Module):
    """Two operators that save one tensor, and one that saves a view of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return (y.sigmoid() * y).sum(dim=1) + (y * y.detach()).sum(dim=1)


def test_what_two_operators_save_is_moved_once_and_used_twice() -> None:
    model, copies = Twice(), Counting()
    offload = Offload(model, [model], copies)
    x = torch.randn(200, 64)
    with offload.share(1.0):
        y = model(x)
    moved = list(copies.copied)
    (first,) = torch.autograd.grad(y.sum(), model.weight, retain_graph=True)
    (second,) = torch.autograd.grad(y.sum(), model.weight)
    (want,) = torch.autograd.grad(model(x).sum(), model.weight)
    assert torch.equal(first, second)
    assert torch.equal(first, want)
    assert (64, 64) not in moved
    assert len(moved) <= 3, "x, y and its sigmoid"


def test_the_graph_owns_what_waits() -> None:
    model = Twice()
    offload = Offload(model, [model], LateCopies())
    with offload.share(1.0):
        y = model(torch.randn(200, 64))
    (refs,) = offload._of_layers.values()
    assert any(one() is not None for one in refs)
    gc.collect()
    gc.disable()
    try:
        del y
        assert all(one() is None for one in refs)
    finally:
        gc.enable()


def test_an_error_in_the_forward_pass_ends_it() -> None:
    model = Twice()
    offload = Offload(model, [model], LateCopies())

    def fail() -> None:
        with offload.share(1.0):
            model(torch.randn(200, 64))
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fail()
    copies = Counting()
    offload._copies = copies
    model(torch.randn(200, 64)).sum().backward()
    assert not copies.copied
    assert not offload._kept


def test_small_tensors_and_no_tokens_stay() -> None:
    model, copies = Twice(), Counting()
    offload = Offload(model, [model], copies)
    rows = LEAST_BYTES // (64 * 4)
    for count, expected in ((0, False), (rows - 1, False), (rows, True)):
        copies.copied.clear()
        with offload.share(1.0):
            y = model(torch.randn(count, 64))
        y.sum().backward()
        assert bool(copies.copied) == expected
    found, _, _ = step(1.0, batch=PackedBatch.empty())
    assert not any(value.any() for value in found.values())


def test_views_and_other_strides_come_back_as_they_were() -> None:
    x = torch.randn(64, 3, 50, requires_grad=True)
    seen: list[tuple[int, ...]] = []

    class Save(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            ctx.save_for_backward(x.detach().transpose(0, 1), x.detach()[:, 1])  # type: ignore[attr-defined]
            return x.sum()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            turned, part = ctx.saved_tensors  # type: ignore[attr-defined]
            seen.extend((turned.stride(), part.stride()))
            assert torch.equal(turned, x.detach().transpose(0, 1))
            assert torch.equal(part, x.detach()[:, 1])
            return grad.expand_as(x)

    model = nn.Identity()
    offload = Offload(model, [model], LateCopies(5))
    with offload.share(0.5):
        y: Tensor = Save.apply(model(x))
    y.backward()
    assert seen == [x.transpose(0, 1).stride(), x[:, 1].stride()]


def test_of_a_checkpoint_the_input_is_moved_alone() -> None:
    """What is recomputed is not kept at all."""
    model, copies = Twice(), Counting()
    offload = Offload(model, [model], copies)
    x = torch.randn(200, 64, requires_grad=True)
    with offload.share(1.0):
        y = checkpoint(model, x, use_reentrant=False)
    y.sum().backward()
    assert copies.copied == [(200, 64), (200, 64)]


def test_what_is_saved_behind_the_last_layer_stays() -> None:
    """It is asked for at once when the backward pass begins."""
    model, copies = nn.Sequential(nn.Sigmoid(), nn.Sigmoid()), Counting()
    offload = Offload(model, [model[0]], copies)
    x = torch.randn(200, 64, requires_grad=True)
    for _ in range(2):
        copies.copied.clear()
        with offload.share(1.0):
            y = model(x)
        assert copies.copied == [(200, 64)], "the first one's output"
        y.sum().backward()
        assert copies.copied == [(200, 64)] * 2
