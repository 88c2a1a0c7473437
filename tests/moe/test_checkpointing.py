from collections import Counter
from typing import Any

import pytest
import torch
from known import grad_of
from moe.helpers import context, gradients, make_layer, make_moe, make_params, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moetrain.moe import RoutingMemo, checkpoint_contexts, saved_ops


class CountOps(TorchDispatchMode):
    """Calls of moetrain's ops that reach a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "moetrain":
            self.calls[func._schema.name.removeprefix("moetrain::")] += 1
        return func(*args, **(kwargs or {}))


def _step(how: str, changes: dict[str, Any]) -> tuple[dict[str, Tensor], list[int], Counter[str]]:
    """Two micro-batches through one layer: gradients, counts, op calls."""
    config = make_moe(**changes)
    layer, weights, balance = make_layer(config, make_params(config, torch.float32))
    total_dx: list[Tensor] = []
    with CountOps() as ops:
        for seed in (1, 2):
            x_TD = tokens(7, torch.float32, seed)
            ctx = context(7, step=14)
            if how == "plain":
                y_TD, aux = layer(x_TD, ctx)
            elif how == "saved":
                y_TD, aux = checkpoint(
                    layer, x_TD, ctx, RoutingMemo(), use_reentrant=False, context_fn=checkpoint_contexts
                )
            else:  # recomputes everything
                y_TD, aux = checkpoint(layer, x_TD, ctx, use_reentrant=False)
            ((y_TD * torch.linspace(-1, 1, y_TD.numel()).view_as(y_TD)).sum() + aux).backward()
            total_dx.append(grad_of(x_TD))
    found = {**gradients(layer, weights), "dx0": total_dx[0], "dx1": total_dx[1]}
    return found, balance.finish_step(lambda x: x).count_LE[0].tolist(), ops.calls


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"score": "sigmoid", "loss_free": True, "shared_width": 3},
        {"rounding": "balance", "tile": 4},
        {"recompute_hidden": True},
    ],
    ids=str,
)
def test_choice_and_counts_are_saved_and_gradients_keep_every_bit(changes: dict[str, Any]) -> None:
    plain, plain_count, plain_calls = _step("plain", changes)
    saved, saved_count, saved_calls = _step("saved", changes)
    for op in ("offer_pairs", "round_pairs"):
        assert saved_calls[op] == plain_calls[op] == (2 if "rounding" in changes else 0)
    assert saved_count == plain_count
    assert sum(plain_count) == 2 * 7 * 2
    assert saved_calls["route"] == plain_calls["route"] == 2, "once per micro-batch"
    assert (plain_calls["expert_mlp"], saved_calls["expert_mlp"]) == (2, 4), "experts are recomputed"
    assert plain_calls["expert_mlp_backward"] == saved_calls["expert_mlp_backward"] == 2
    for name, grad in plain.items():
        assert grad.any()
        assert torch.equal(saved[name], grad), name


def test_without_memo_and_saved_ops_statistics_would_count_twice() -> None:
    _, plain_count, _ = _step("plain", {})
    _, count, calls = _step("everything", {})
    assert calls["route"] == 4
    assert count == [2 * c for c in plain_count]


def test_memo_makes_a_value_once() -> None:
    memo = RoutingMemo()
    made = []
    for _ in range(3):
        assert memo.once("a", lambda: made.append(1) or 5) == 5  # type: ignore[func-returns-value]
    assert memo.once("b", lambda: None) is None
    assert made == [1]
    assert [op.name() for op in saved_ops()] == ["moetrain::route"]


def test_recomputation_may_run_more_than_the_forward_pass_did() -> None:
    def region(x_T: Tensor) -> Tensor:
        runs.append(1)
        if len(runs) > 1:  # as FSDP does around a module that it gathers only sometimes
            torch.ones(1).exp().sinh()
        return x_T.exp().sin()

    runs: list[int] = []
    x_T = torch.randn(3, requires_grad=True)
    checkpoint(region, x_T, use_reentrant=False, context_fn=checkpoint_contexts).sum().backward()
    assert len(runs) == 2
    torch.testing.assert_close(x_T.grad, x_T.exp().cos() * x_T.exp())
