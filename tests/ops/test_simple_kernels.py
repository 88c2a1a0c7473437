"""Who multiplies bf16 on CUDA without tensor cores is told why; what the reasons are, tests/cuda shows."""

import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from moetrain.ops import grouped_gemm, grouped_gemm_varlen_k, native, simple_kernels
from moetrain.ops.simple_kernels import warn_of_simple_kernels

ON_CUDA = SimpleNamespace(is_cuda=True)


@pytest.fixture
def obstacles(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Lets an operator's obstacles be those, call by call."""

    def be(texts: list[str]) -> None:
        monkeypatch.setattr(simple_kernels, "OPS", SimpleNamespace(product_obstacle=lambda *_: texts.pop(0)))

    return be


def test_each_reason_is_told_once(obstacles: Callable[[list[str]], None]) -> None:
    obstacles(["", "K of 8", "K of 8", "N of 8", ""])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(5):
            warn_of_simple_kernels("product", ON_CUDA)
    assert [str(warning.message) for warning in caught] == [
        f"product runs its simple kernels, without tensor cores, since the others need {reason}; "
        "MOETRAIN_CUDA_PATH=simple silences this"
        for reason in ("K of 8", "N of 8")
    ]


def test_nobody_is_asked_on_a_cpu_or_in_a_graph(
    obstacles: Callable[[list[str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    obstacles([])  # to ask is an error
    warn_of_simple_kernels("product", torch.zeros(2))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    warn_of_simple_kernels("product", ON_CUDA)


def test_the_operators_ask_for_what_they_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, tuple[Any, ...]]] = []
    for module in ("grouped_gemm", "grouped_gemm_varlen_k"):
        home = sys.modules[f"moetrain.ops.{module}"]  # not the function of that name
        monkeypatch.setattr(home, "warn_of_simple_kernels", lambda op, *args: asked.append((op, args)))
    with FakeTensorMode(), torch.no_grad():
        a, b, offset = torch.zeros(5, 8), torch.zeros(2, 3, 8), torch.zeros(3, dtype=torch.int32)
        slot, row, out = offset[:2], torch.zeros(4, dtype=torch.int32), torch.zeros(2, 8, 8)
        grouped_gemm(a, b, offset, slot_E=slot, row_M=row)
        grouped_gemm_varlen_k(a, a, offset, row_b_M=row, row_a_M=row, num_slots=2)
        grouped_gemm_varlen_k(a, a, offset, num_slots=2, out=out)
        wanted = [
            ("grouped_gemm", (a, b, offset, slot, row, False)),
            ("grouped_gemm_varlen_k", (a, a, offset, None, row, row, 2, None)),
            ("grouped_gemm_varlen_k", (a, a, offset, None, None, None, 2, out)),
        ]
        assert [op for op, _ in asked] == [op for op, _ in wanted]
        for (_, args), (_, like) in zip(asked, wanted, strict=True):
            assert all(x is y for x, y in zip(args, like, strict=True))
        assert native.OPS.grouped_gemm_obstacle(*wanted[0][1]) == ""  # as a traced call would
