"""Adapters to other libraries' GPU kernels, held against stand-ins that do in plain torch what those document.

A stand-in has its library's signature and layouts, so that an adapter that swaps gate and up, or orders pairs wrongly,
is caught where no GPU is. Liger's own kernels run too where it is installed, interpreted by Triton.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from enum import Enum
from itertools import pairwise
from types import ModuleType
from typing import Any

import expert_case
import kernel_peers
import pytest
import torch
from expert_case import PIPELINE, Setting, assemble
from expert_layer import Competitor, Layer, check, definition, largest_errors, make_layer
from expert_peers import OnPath
from shapes import Shape
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from moetrain.ops.cuda_path import VARIABLE

SMALL = Shape("small", T=48, D=64, F=32, E=5, K=2)


def experts(x_ND: Tensor, ends: list[int], w_in: Tensor, w_out: Tensor, *, up_first: bool, apart: bool) -> Tensor:
    """Expert by expert; where gate and up rows of w_in are says the layout: halves or, with ``apart``, every other."""
    parts = []
    for expert, (start, stop) in enumerate(pairwise([0, *ends])):
        h = linear(x_ND[start:stop], w_in[expert])
        first, second = (h[:, ::2], h[:, 1::2]) if apart else h.chunk(2, dim=-1)
        gate, up = (second, first) if up_first else (first, second)
        parts.append(linear(silu(gate) * up, w_out[expert]))
    return torch.cat(parts)


def grouped(expert_id_P: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    order_N = expert_id_P.long().argsort(stable=True)
    return order_N, torch.bincount(expert_id_P.long(), minlength=num_experts).cumsum(0).tolist()


def fake_liger() -> dict[str, ModuleType]:
    class LigerFusedMoEFunction:
        @staticmethod
        def apply(x: Tensor, gate_up: Tensor, down: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            assert top_k_index.dtype == torch.int32
            order_N, ends = grouped(top_k_index.flatten(), gate_up.shape[0])
            token_N = order_N // top_k_index.shape[1]
            y_ND = experts(x[token_N], ends, gate_up, down, up_first=False, apart=False)
            weight_N = top_k_weights.flatten()[order_N]
            return torch.zeros_like(x).index_add(0, token_N, (y_ND * weight_N[:, None]).to(x.dtype))

    return modules({"liger_kernel": {}, "liger_kernel.ops": {"LigerFusedMoEFunction": LigerFusedMoEFunction}})


def fake_scattermoe() -> dict[str, ModuleType]:
    class Experts(nn.Module):
        def __init__(self, num_experts: int, input_size: int, output_size: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(num_experts, output_size, input_size))

    class GLUMLP(nn.Module):
        def __init__(
            self, input_size: int, hidden_size: int, num_experts: int, top_k: int,
            bias: bool = False, activation: nn.Module | None = None,
        ) -> None:  # fmt: skip
            super().__init__()
            self.experts = Experts(num_experts, input_size, 2 * hidden_size)
            self.output_experts = Experts(num_experts, hidden_size, input_size)

        def forward(self, x: Tensor, expert_p: Tensor, expert_idxs: Tensor) -> Tensor:
            assert expert_p.dtype == x.dtype
            order_N, ends = grouped(expert_idxs.flatten(), self.experts.weight.shape[0])
            token_N = order_N // expert_idxs.shape[1]
            weights = self.experts.weight, self.output_experts.weight
            y_ND = experts(x[token_N], ends, *weights, up_first=True, apart=False)
            return torch.zeros_like(x).index_add(0, token_N, y_ND * expert_p.flatten()[order_N][:, None])

    return modules({"scattermoe": {}, "scattermoe.mlp": {"GLUMLP": GLUMLP}})


def fake_sonicmoe() -> dict[str, ModuleType]:
    class ActivationType(Enum):
        SWIGLU = "swiglu"

    def moe_general_routing_inputs(
        x: Tensor, router_scores: Tensor, token_indices: Tensor, expert_indices: Tensor, w1: Tensor, b1: None,
        w2: Tensor, b2: None, E: int, stream_id: int, activation_type: ActivationType,
        is_inference_mode_enabled: bool = False,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert token_indices.dtype == expert_indices.dtype == torch.int32
        assert bool((token_indices.diff() >= 0).all())
        assert w1.shape[-1] == w2.shape[-1] == E
        order_N, ends = grouped(expert_indices, E)
        token_N = token_indices.long()[order_N]
        weights = w1.permute(2, 0, 1), w2.permute(2, 0, 1)
        y_ND = experts(x[token_N], ends, *weights, up_first=False, apart=True)
        y_TD = torch.zeros_like(x).index_add(0, token_N, (y_ND * router_scores[order_N][:, None]).to(x.dtype))
        return y_TD, torch.bincount(expert_indices, minlength=E)

    functional: dict[str, object] = {"moe_general_routing_inputs": moe_general_routing_inputs}
    return modules(
        {"sonicmoe": {}, "sonicmoe.enums": {"ActivationType": ActivationType}, "sonicmoe.functional": functional}
    )


def fake_quack() -> dict[str, ModuleType]:
    def rows_of(A: Tensor, A_idx: Tensor | None) -> Tensor:
        return A if A_idx is None else A[A_idx.long()]

    def gemm(
        A: Tensor, B: Tensor, out: Tensor | None = None, *, cu_seqlens_m: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None, A_idx: Tensor | None = None, dynamic_scheduler: bool = False,
    ) -> Tensor:  # fmt: skip
        if cu_seqlens_m is not None:
            rows, places = rows_of(A, A_idx), list(pairwise(cu_seqlens_m.tolist()))
            return torch.cat([rows[i:j] @ B[e] for e, (i, j) in enumerate(places)])
        assert cu_seqlens_k is not None
        assert out is not None
        rows = rows_of(A.T, A_idx)
        for e, (i, j) in enumerate(pairwise(cu_seqlens_k.tolist())):
            out[e] = rows[i:j].T @ B[i:j]
        return out

    def gemm_act(A: Tensor, B: Tensor, *, activation: str, **options: Any) -> tuple[Tensor, Tensor]:
        assert activation == "swiglu"
        h = gemm(A, B, **options)
        return h, silu(h[:, ::2]) * h[:, 1::2]

    def gemm_dact(
        A: Tensor, B: Tensor, PreAct: Tensor, activation: str, *, colvec_scale: Tensor, colvec_reduce: bool,
        **options: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        assert (activation, colvec_reduce) == ("swiglu", True)
        da = gemm(A, B, **options)
        with torch.enable_grad():
            h = PreAct.detach().requires_grad_()
            a = silu(h[:, ::2]) * h[:, 1::2]
            (dh,) = torch.autograd.grad(a, h, (da * colvec_scale[:, None]).to(a.dtype))
        a = a.detach()
        return dh, (a * colvec_scale[:, None]).to(a.dtype), (da * a).float().sum(-1)

    return modules({"quack": {"gemm_interface": {"gemm": gemm, "gemm_act": gemm_act, "gemm_dact": gemm_dact}}})


def modules(named: dict[str, dict[str, object]]) -> dict[str, ModuleType]:
    made = {}
    for name, members in named.items():
        made[name] = ModuleType(name)
        for key, value in members.items():
            if isinstance(value, dict):
                made[f"{name}.{key}"] = inner = ModuleType(f"{name}.{key}")
                inner.__dict__.update(value)
                value = inner
            setattr(made[name], key, value)
    return made


FAKES: dict[str, Callable[[], dict[str, ModuleType]]] = {
    "liger": fake_liger,
    "scattermoe": fake_scattermoe,
    "sonicmoe": fake_sonicmoe,
    "quack": fake_quack,
}


def install(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for path, module in FAKES[name]().items():
        monkeypatch.setitem(sys.modules, path, module)


def judged(peer: Competitor, layer: Layer) -> dict[str, float]:
    exact = definition(layer, torch.float64)
    return check(peer, layer, exact, largest_errors(definition(layer, layer.x_TD.dtype), exact))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAKES)
def test_an_adapter_speaks_its_librarys_layout(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, name)
    layer = make_layer(SMALL, dtype, "cpu")
    judged(getattr(kernel_peers, name)(layer), layer)


@pytest.mark.parametrize("name", ["sonicmoe", "quack"])
def test_rows_of_gate_and_up_in_another_order_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, name)
    monkeypatch.setattr(kernel_peers, "interleave", lambda w: w.flatten(1, 2).contiguous())
    layer = make_layer(SMALL, torch.float32, "cpu")
    with pytest.raises(ValueError, match="the largest error of y must be at most"):
        judged(getattr(kernel_peers, name)(layer), layer)


def test_a_peer_that_is_missing_wrong_or_broken_is_reported_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(layer: Layer) -> Competitor:
        good = expert_case.PEERS["loop"](layer)
        return Competitor("wrong", lambda: good.run() * 2, good.leaves)

    def broken(layer: Layer) -> Competitor:
        raise AssertionError("no such device")

    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setitem(expert_case.PEERS, "wrong", wrong)
    monkeypatch.setitem(expert_case.PEERS, "broken", broken)
    peers = ("liger", "wrong", "broken", "loop")
    contest = assemble(make_layer(SMALL, torch.float32, "cpu"), Setting(torch.float32, "cpu", 1, peers, "default"))
    assert list(contest.forward) == ["moetrain", PIPELINE, "torch sorted loop"]
    assert contest.skipped["liger"].startswith("ModuleNotFoundError: ")
    assert "the largest error of y" in contest.skipped["wrong"]
    assert contest.skipped["broken"] == "AssertionError: no such device"


def test_a_forced_path_holds_in_both_passes_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    seen = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            seen.append(("forward", os.environ.get(VARIABLE)))
            return x * 1

        @staticmethod
        def backward(ctx: object, dy: Tensor) -> Tensor:
            seen.append(("backward", os.environ.get(VARIABLE)))
            return dy

    x = torch.ones(3, requires_grad=True)
    peer = OnPath("on a path", lambda: Watched.apply(x), (x,), path="sm80")
    peer.forward_backward(torch.ones(3))
    assert seen == [("forward", "sm80"), ("backward", "sm80")]
    assert VARIABLE not in os.environ
    with pytest.raises(ValueError, match="the path sm80 is one of CUDA, and the layer is on the CPU"):
        expert_case.PEERS["path-sm80"](make_layer(SMALL, torch.float32, "cpu"))


LIGER = """
import torch
from expert_layer import check, definition, largest_errors, make_layer
from kernel_peers import liger
from shapes import Shape
layer = make_layer(Shape("small", T=48, D=64, F=32, E=5, K=2), torch.float32, "cpu")
exact = definition(layer, torch.float64)
print(check(liger(layer), layer, exact, largest_errors(definition(layer, torch.float32), exact)))
"""


def test_ligers_own_kernels_where_triton_interprets_them() -> None:
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed")
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", LIGER], env=env, capture_output=True, text=True, timeout=280)
    if "InterpreterError" in done.stderr:  # Triton 3.6's needs a NumPy before 2.4
        pytest.skip(f"Triton's interpreter does not run them here: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
