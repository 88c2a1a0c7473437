from dataclasses import replace
from typing import Any

import pytest
import torch
from moe.helpers import integer_routing

from moetrain.moe import Routing


def _good() -> Routing:
    return integer_routing(num_tokens=5, num_experts=3, top_k=2, seed=0)


def test_a_good_routing_passes_and_tells_its_sizes() -> None:
    routing = _good()
    assert routing.validate() is routing
    assert (routing.capacity, routing.num_experts, routing.num_tokens) == (10, 3, 5)


def test_no_tokens_is_a_good_routing() -> None:
    integer_routing(num_tokens=0, num_experts=3, top_k=2, seed=0).validate()


def test_the_tail_may_hold_anything() -> None:
    routing = _good()
    tail_token_N = torch.cat((routing.token_N, torch.tensor([-9, 1 << 20], dtype=torch.int32)))
    tail_weight_N = torch.cat((routing.weight_N, torch.tensor([float("nan"), 1.0])))
    replace(routing, token_N=tail_token_N, weight_N=tail_weight_N).validate()


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("token_N", torch.zeros(10, dtype=torch.int64), r"token_N must be int32 \[N\], got torch.int64 \[10\]"),
        ("weight_N", torch.zeros(9), r"weight_N \[9\] must be as long as token_N \[10\]"),
        ("weight_N", torch.zeros(10, dtype=torch.bfloat16), "weight_N must be at least float32, got torch.bfloat16"),
        ("weight_N", torch.full((10,), float("inf")), "weight_N must be finite"),
        ("token_N", torch.full((10,), 5, dtype=torch.int32), r"token_N must lie in \[0, 5\), got 5 to 5"),
        ("token_N", torch.zeros(10, dtype=torch.int32), "tokens of expert 0 must strictly ascend"),
        ("offset_E1", torch.tensor([1, 2], dtype=torch.int32), r"offset_E1 must start at 0 and never fall, got \[1, 2"),
        ("offset_E1", torch.tensor([0, 3, 2], dtype=torch.int32), r"never fall, got \[0, 3, 2\]"),
        ("offset_E1", torch.tensor([0, 11], dtype=torch.int32), "ends at 11, beyond the capacity of 10 pairs"),
        ("offset_E1", torch.tensor([], dtype=torch.int32), "one more entry than there are experts, got none"),
        ("limit", 3, "no expert may have more than 3 pairs, its limit, but one has 4"),
        ("token_gid_T2", torch.zeros(4, 2, dtype=torch.int64), r"token_gid_T2 must be int64 \[5, 2\].*\[4, 2\]"),
    ],
)
def test_a_broken_promise_is_named(field: str, value: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        replace(_good(), **{field: value}).validate()
