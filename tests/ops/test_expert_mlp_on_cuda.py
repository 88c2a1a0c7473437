"""expert_mlp on a GPU by every path that it can run: values, gradients, CUDA graphs and torch.compile."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.expert_cases import SIZES, Case, excess, int32, make_case, output_gradient, run
from torch import Tensor

from moetrain.ops import expert_mlp
from moetrain.ops.cuda_path import CUDA_PATHS, obstacle_to
from moetrain.ops.expert_inputs import ExpertInputs
from moetrain.ops.reference_expert_mlp import expert_mlp_reference

pytestmark = pytest.mark.gpu

ACTIVATIONS = ["swiglu", "gelu", "relu2"]


@pytest.fixture(params=CUDA_PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forced; skipped where this GPU cannot run it."""
    case = make_case([1], torch.bfloat16, aligned=True)
    inputs = ExpertInputs(case.x_RD, case.row_N, case.weight_N, case.offset_E1, case.w_in, case.w_out)
    obstacle = obstacle_to(request.param, torch.cuda.get_device_capability(), inputs)
    if obstacle is not None:
        pytest.skip(f"{request.param} needs {obstacle}")
    monkeypatch.setenv("MOETRAIN_CUDA_PATH", request.param)
    return request.param


def require_as_accurate_as_torch(case: Case, **options: Any) -> None:
    mine = run(expert_mlp, case, **options)
    over = excess(mine, run(expert_mlp_reference, case.double()), run(expert_mlp_reference, case))
    assert max(over.values()) <= 0, over


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("recompute_h", [False, True])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_as_accurate_as_torch(activation: str, biases: bool, recompute_h: bool) -> None:
    case = make_case(SIZES["uneven"], torch.bfloat16, activation=activation, biases=biases, aligned=True, device="cuda")
    require_as_accurate_as_torch(case, recompute_h=recompute_h)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("size", [(64, 32), (8, 8), (96, 160), (520, 200), (1032, 1024)], ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_widths(activation: str, size: tuple[int, int]) -> None:
    width, hidden = size
    case = make_case(
        [64, 133, 0, 97, 31, 1, 32],
        torch.bfloat16,
        rows=150,
        width=width,
        hidden=hidden,
        activation=activation,
        aligned=True,
        device="cuda",
    )
    require_as_accurate_as_torch(case)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_lists(sizes: list[int]) -> None:
    require_as_accurate_as_torch(make_case(sizes, torch.bfloat16, biases=True, aligned=True, device="cuda"))


@pytest.mark.usefixtures("path")
def test_long_lists() -> None:
    sizes = [5, 0, 1700, 40, 800]
    case = make_case(sizes, torch.bfloat16, rows=2300, width=520, hidden=72, aligned=True, device="cuda")
    require_as_accurate_as_torch(case)


def step_of(case: Case) -> Callable[[], tuple[Tensor, ...]]:
    leaves = case.leaves()
    inputs = [leaves.x_RD, leaves.weight_N, leaves.w_in, leaves.w_out]
    dy_RD = output_gradient(case)

    def step() -> tuple[Tensor, ...]:
        y_RD = expert_mlp(*leaves.args(), **leaves.kwargs())
        return y_RD.detach(), *torch.autograd.grad(y_RD, inputs, dy_RD)

    return step


def test_a_cuda_graph_replays_other_lists(path: str) -> None:
    """What it captured reads the offsets on the device: the same graph serves other sizes of groups."""
    if path == "loop":
        pytest.skip("loop reads the offsets on the host")
    case = make_case([10, 20, 0, 30, 4], torch.bfloat16, rows=50, aligned=True, device="cuda")
    step = step_of(case)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for sizes in ([10, 20, 0, 30, 4], [0, 1, 60, 0, 0]):
        case.offset_E1.copy_(int32([0, *torch.tensor(sizes).cumsum(0).tolist()], "cuda"))
        graph.replay()
        got = [result.clone() for result in results]
        assert all(torch.equal(one, other) for one, other in zip(got, step(), strict=True))
    assert got[0].any()


@pytest.mark.usefixtures("path")
def test_compiles_in_one_graph() -> None:
    case = make_case(SIZES["uneven"], torch.bfloat16, aligned=True, device="cuda")

    def half(x_RD: Tensor, w_in: Tensor) -> Tensor:
        changed = case.but(x_RD=x_RD, w_in=w_in)
        return 0.5 * expert_mlp(*changed.args(), **changed.kwargs())

    leaves = case.leaves()
    compiled = torch.compile(half, fullgraph=True)
    inputs = (leaves.x_RD, leaves.w_in)
    expected = torch.autograd.grad(half(*inputs).float().square().sum(), inputs)
    for grad, wanted in zip(
        torch.autograd.grad(compiled(*inputs).float().square().sum(), inputs), expected, strict=True
    ):
        torch.testing.assert_close(grad, wanted, rtol=0.02, atol=0.02 * wanted.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_other_dtypes_warn_once_and_are_right(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOETRAIN_CUDA_PATH", raising=False)
    case = make_case(SIZES["uneven"], dtype, device="cuda")
    with pytest.warns(UserWarning, match=r"expert_mlp runs from separate products \(simple\).* need bfloat16, got "):
        require_as_accurate_as_torch(case)
