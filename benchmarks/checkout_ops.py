"""Seconds of operators of whichever moetrain is imported, for compare_checkouts.py --ops: names that all versions have.

Shapes: T tokens, D width, F expert width, E experts, K experts per token, N = T * K pairs.
"""

import inspect
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

T, D, F, E, K = 4096, 384, 256, 32, 4
HEADS, HEAD_DIM, ROWS = 6, 64, 8
TURNS = 5
SECONDS = 0.15  # of each operator per turn


def cases() -> dict[str, Callable[[], object]]:
    """What to call, by name; gradients included."""
    from moetrain import ops

    torch.manual_seed(0)
    logits_TE = torch.randn(T, E)
    routed = ops.route(logits_TE, K)
    pairs = routed.token_N, routed.weight_N, routed.offset_E1

    def route() -> None:
        again = ops.route(logits_TE.clone().requires_grad_(), K)
        (again.weight_N.sum() + again.prob_sum_GE.square().sum()).backward()

    found: dict[str, Callable[[], object]] = {"route": route}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        found |= {f"{op} {name}": call for op, call in cases_of(dtype, *pairs).items()}
    return found


def cases_of(
    dtype: torch.dtype, token_N: Tensor, weight_N: Tensor, offset_E1: Tensor
) -> dict[str, Callable[[], object]]:
    """Operators on rows of one type."""
    from moetrain import ops

    def leaf(*shape: int) -> Tensor:
        return (torch.randn(*shape) * shape[-1] ** -0.5).to(dtype).requires_grad_()

    x_TD, w_in, w_out, weight_D = leaf(T, D), leaf(E, 2, F, D), leaf(E, D, F), leaf(D)
    q, k, v = (leaf(ROWS, T // ROWS, HEADS, HEAD_DIM) for _ in range(3))
    attention = attention_of(q, k, v)
    angle = torch.rand(ROWS, T // ROWS, HEAD_DIM // 2)

    def backward(y: Tensor) -> None:
        y.backward(torch.ones_like(y))

    return {
        "expert_mlp": lambda: backward(ops.expert_mlp(x_TD, token_N, weight_N, offset_E1, w_in, w_out)),
        "gather_rows": lambda: ops.gather_rows(x_TD.detach(), token_N, offset_E1),
        "scatter_add_rows": lambda: ops.scatter_add_rows(
            x_TD.detach().repeat(K, 1), token_N, weight_N.detach(), offset_E1, num_rows=T
        ),
        "causal_attention": lambda: backward(attention()),
        "rms_norm": lambda: backward(ops.rms_norm(x_TD, weight_D, 1e-6)),
        "rotate": lambda: backward(ops.rotate(q, angle.cos(), angle.sin())),
    }


def attention_of(q_BSHd: Tensor, k_BSHd: Tensor, v_BSHd: Tensor) -> Callable[[], Tensor]:
    """``causal_attention`` of rows; versions from 2026-12 on take them end to end."""
    from moetrain import ops

    num_rows, length = q_BSHd.shape[:2]
    if "offset_R1" not in inspect.signature(ops.causal_attention).parameters:
        first_BS = torch.zeros(num_rows, length, dtype=torch.int32)
        return lambda: ops.causal_attention(q_BSHd, k_BSHd, v_BSHd, first_BS)  # type: ignore[call-arg]
    offset_R1 = length * torch.arange(num_rows + 1, dtype=torch.int32)
    first_T = offset_R1[:-1].repeat_interleave(length)
    q, k, v = (x.flatten(0, 1) for x in (q_BSHd, k_BSHd, v_BSHd))
    return lambda: ops.causal_attention(q, k, v, first_T, offset_R1)


def seconds_of(call: Callable[[], object]) -> float:
    """The lower quartile of calls within ``SECONDS``, at least three."""
    taken: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(taken) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.quantiles(taken, n=4)[0]


def main() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    calls = cases()
    for call in calls.values():
        call()
    turns = [{name: seconds_of(call) for name, call in calls.items()} for _ in range(TURNS)]
    Path(sys.argv[1]).write_text(json.dumps({name: min(turn[name] for turn in turns) for name in calls}))


if __name__ == "__main__":
    main()
