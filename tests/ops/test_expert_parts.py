"""expert_mlp from separate products, on CPU tensors: by torch._grouped_mm, and what all three ways have in common."""

import dataclasses
from typing import Any

import pytest
import torch
from ops.expert_cases import SIZES, TAIL, Case, ExpertMlp, excess, int32, make_case, of_parts, output_gradient, run
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from moetrain.ops import expert_mlp, expert_parts
from moetrain.ops.cuda_path import CUDA_PATHS
from moetrain.ops.expert_inputs import ExpertInputs
from moetrain.ops.expert_parts import backward_of_parts, forward_of_parts
from moetrain.ops.expert_products import Groups, is_aligned, products
from moetrain.ops.reference_expert_mlp import expert_mlp_reference

ACTIVATIONS = ["swiglu", "gelu", "relu2"]
WAYS = ["simple", "grouped_mm", "loop"]
GROUPED_MM_DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def require_as_accurate_as_torch(mlp: ExpertMlp, case: Case, **options: Any) -> None:
    mine = run(mlp, case, **options)
    over = excess(mine, run(expert_mlp_reference, case.double()), run(expert_mlp_reference, case))
    assert max(over.values()) <= 0, over


@pytest.mark.parametrize("recompute_h", [False, True])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", GROUPED_MM_DTYPES)
def test_grouped_mm_is_as_accurate_as_torch(
    dtype: torch.dtype, activation: str, biases: bool, recompute_h: bool
) -> None:
    case = make_case(SIZES["uneven"], dtype, activation=activation, biases=biases)
    require_as_accurate_as_torch(of_parts("grouped_mm"), case, recompute_h=recompute_h)


@pytest.mark.parametrize("slots", ["shared", "own"])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("dtype", GROUPED_MM_DTYPES)
def test_lists_by_grouped_mm(dtype: torch.dtype, sizes: list[int], slots: str) -> None:
    case = make_case(sizes, dtype, rows=30, biases=True)
    if slots == "own":
        num = len(sizes)
        halves = {name: getattr(case, name)[:num] for name in ("w_in", "w_out", "b_in", "b_out")}
        case = case.but(slot_E=None, **halves)
    require_as_accurate_as_torch(of_parts("grouped_mm"), case)


def test_the_rule_notices_a_dropped_weight_and_swapped_projections() -> None:
    case = make_case(SIZES["uneven"], torch.bfloat16)
    exact, torchs = run(expert_mlp_reference, case.double()), run(expert_mlp_reference, case)
    weight_N = case.weight_N.clone()
    weight_N[9] = 0
    for way in WAYS:
        dropped = excess(run(of_parts(way), case.but(weight_N=weight_N)), exact, torchs)
        assert all(over > 0 for name, over in dropped.items() if name != "dweight_N"), dropped
        swapped = excess(run(of_parts(way), case.but(w_in=case.w_in.flip(1))), exact, torchs)
        assert min(swapped.values()) > 0, swapped


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("biases", [False, True])
def test_tail_unused_slots_and_rows_without_pairs(way: str, biases: bool) -> None:
    case = make_case(SIZES["uneven"], torch.bfloat16, biases=biases)
    x_RD, dy_RD = case.x_RD.clone(), output_gradient(case)
    x_RD[-1] = dy_RD[-1] = float("nan")  # a row that nothing reads
    assert case.slot_E is not None
    unused = sorted(set(range(7)) - set(case.slot_E.tolist()))
    w_in, w_out = case.w_in.clone(), case.w_out.clone()
    w_in[unused] = w_out[unused] = float("nan")
    results = run(of_parts(way), case.but(x_RD=x_RD, w_in=w_in, w_out=w_out), dy_RD)
    assert all(value.isfinite().all() for value in results.values())
    assert not results["y_RD"][-1].any()
    assert not results["dx_RD"][-1].any()
    assert not results["dweight_N"][-TAIL:].any()
    assert results["dweight_N"][:-TAIL].all()
    for name in ("w_in", "w_out", *(("b_in", "b_out") if biases else ())):
        assert not results[f"d{name}"][unused].any()
        assert results[f"d{name}"].any()


@pytest.mark.parametrize("way", WAYS)
def test_all_slots_may_be_one_matrix(way: str) -> None:
    case = make_case(SIZES["uneven"], torch.bfloat16)
    one = {name: getattr(case, name)[:1].expand(getattr(case, name).shape) for name in ("w_in", "w_out")}
    require_as_accurate_as_torch(of_parts(way), case.but(**one))


@pytest.mark.parametrize("way", WAYS)
def test_lists_longer_than_what_exists_in_fp32(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_parts, "PAIRS_AT_A_TIME", 16)
    require_as_accurate_as_torch(of_parts(way), make_case(SIZES["many tiles"], torch.bfloat16, biases=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("rows", "sizes"), [(0, [0, 0, 0]), (5, [0, 0, 0]), (5, [])], ids=str)
def test_no_rows_pairs_or_experts(way: str, rows: int, sizes: list[int]) -> None:
    case = make_case(sizes, torch.bfloat16, rows=rows, biases=True)
    case = case.but(row_N=case.row_N[:0], weight_N=case.weight_N[:0]) if rows else case
    results = run(of_parts(way), case)
    assert results["y_RD"].shape == (rows, 40)
    assert not results["y_RD"].any()
    for name in ("weight_N", "w_in", "w_out", "b_in", "b_out"):
        assert results[f"d{name}"].shape == getattr(case, name).shape
        assert not results[f"d{name}"].any()


@pytest.mark.parametrize("way", WAYS)
def test_recomputing_h_changes_no_bit(way: str) -> None:
    case = make_case(SIZES["many tiles"], torch.bfloat16, biases=True)
    kept, recomputed = run(of_parts(way), case), run(of_parts(way), case, recompute_h=True)
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("recompute_h", [False, True])
def test_saves_rows_h_and_metadata_alone(way: str, recompute_h: bool) -> None:
    case = make_case(SIZES["many tiles"], torch.bfloat16, biases=True).leaves()
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        of_parts(way)(*case.args(), **case.kwargs(), recompute_h=recompute_h)
    given = {getattr(case, field.name).data_ptr() for field in dataclasses.fields(case) if field.name != "activation"}
    made = [tensor for tensor in saved if tensor.data_ptr() not in given]
    assert [tuple(tensor.shape) for tensor in made] == ([] if recompute_h else [(case.row_N.shape[0], 64)])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("way", ["simple", "loop"])
def test_gradient(way: str, activation: str) -> None:
    case = make_case([2, 0, 3], torch.float64, rows=4, width=3, hidden=2, activation=activation, biases=True).leaves()
    case.weight_N.detach()[5:] = 1.0  # finite differences move the tail too
    assert case.b_in is not None
    assert case.b_out is not None
    inputs = [case.x_RD, case.weight_N, case.w_in, case.w_out, case.b_in, case.b_out]

    def mlp(x_RD: Tensor, weight_N: Tensor, w_in: Tensor, w_out: Tensor, b_in: Tensor, b_out: Tensor) -> Tensor:
        changed = case.but(x_RD=x_RD, weight_N=weight_N, w_in=w_in, w_out=w_out, b_in=b_in, b_out=b_out)
        return of_parts(way)(*changed.args(), **changed.kwargs())

    torch.autograd.gradcheck(mlp, inputs)


CASE = make_case([1, 3], torch.bfloat16, rows=5, width=8, hidden=8, biases=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"x_RD": CASE.x_RD[0]}, ValueError, r"expert_mlp: x must be \[R, D\], got \[8\]"),
        ({"row_N": CASE.row_N.long()}, TypeError, "row must be Int, got Long"),
        ({"row_N": int32([0, 1, 5, 0, 0, 0, 0])}, ValueError, r"row\[2\] is 5, but the number of rows of x is 5"),
        ({"weight_N": CASE.weight_N.double()}, TypeError, "weight must be Float, got Double"),
        ({"offset_E1": int32([0, 3, 2])}, ValueError, r"offset must not fall, got offset\[1\] = 3 and offset\[2\] = 2"),
        ({"slot_E": int32([0, 4])}, ValueError, r"slot\[1\] is 4, but the number of slots is 4"),
        ({"w_out": CASE.w_out.float()}, TypeError, "w_out must have the dtype of x"),
    ],
)
def test_errors_are_those_of_the_operator(way: str, changes: dict[str, Any], error: type[Exception], text: str) -> None:
    case = CASE.but(**changes)
    with pytest.raises(error, match=text):
        of_parts(way)(*case.args(), **case.kwargs())


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ValueError, match="its products must be one of grouped_mm, simple, loop, got quick"):
        of_parts("quick")(*CASE.args(), **CASE.kwargs())


@pytest.mark.parametrize("slot_E", [None, int32([1, 0])], ids=["own", "listed"])
def test_grouped_mm_copies_weights_that_are_not_aligned(slot_E: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    w_SNK = torch.randn(2, 3 * 8 * 16 + 1).bfloat16()[:, 1:].unflatten(1, (24, 16))
    assert not is_aligned(w_SNK)
    taken: list[Tensor] = []
    grouped_mm = torch._grouped_mm

    def spy(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
        taken.extend((a, b.mT))
        return grouped_mm(a, b, offs=offs)

    monkeypatch.setattr(torch, "_grouped_mm", spy)
    a = torch.randn(5, 16).bfloat16()
    c = products("grouped_mm", Groups(int32([0, 2, 5]), slot_E, 2)).by_rows(a, w_SNK)
    first, second = (0, 1) if slot_E is None else slot_E.tolist()
    assert torch.equal(c, torch.cat((a[:2] @ w_SNK[first].mT, a[2:] @ w_SNK[second].mT)))
    assert [is_aligned(tensor) for tensor in taken] == [True, True]


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretends that CPU tensors are on a Hopper GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))


ON_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
OPS = torch.ops.moetrain


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("save_h", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("way", WAYS)
def test_the_operator_on_cuda_runs_the_forced_path(
    way: str, activation: str, save_h: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOETRAIN_CUDA_PATH", way)
    case = make_case(SIZES["uneven"], torch.bfloat16, activation=activation, biases=True)
    dy_RD = output_gradient(case)
    wanted = run(of_parts(way), case)
    y_RD, h = OPS.expert_mlp.default.redispatch(ON_CUDA, *case.positional(), save_h)
    assert torch.equal(y_RD, wanted["y_RD"])
    *tensors, _ = case.positional()
    args = (dy_RD, *tensors, h if save_h else None, activation)
    gradients = OPS.expert_mlp_backward.default.redispatch(ON_CUDA, *args)
    names = ("x_RD", "weight_N", "w_in", "w_out", "b_in", "b_out")
    assert all(torch.equal(grad, wanted[f"d{name}"]) for grad, name in zip(gradients, names, strict=True))
    _, on_cpu = OPS.expert_mlp(*case.positional(), save_h)
    assert h.shape == on_cpu.shape, "what is traced must not depend on the path"


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("way", ["sm90", "sm80", None])
def test_the_operator_on_cuda_runs_its_kernels(way: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here they are missing, and no other way is taken."""
    monkeypatch.setenv("MOETRAIN_CUDA_PATH", way or "")
    case = make_case(SIZES["uneven"], torch.bfloat16).but(slot_E=None)
    case = case.but(w_in=torch.randn(5, 2, 24, 40).bfloat16(), w_out=torch.randn(5, 40, 24).bfloat16())
    *tensors, activation = case.positional()
    with pytest.raises(NotImplementedError, match="moetrain::expert_mlp_kernels' "):
        OPS.expert_mlp.default.redispatch(ON_CUDA, *case.positional(), False)
    with pytest.raises(NotImplementedError, match="moetrain::expert_mlp_kernels_backward' "):
        OPS.expert_mlp_backward.default.redispatch(ON_CUDA, case.x_RD, *tensors, None, activation)


def fake_case(dtype: torch.dtype, device: str = "cuda") -> tuple[Any, ...]:
    def floats(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device=device)

    def integers(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=device)

    weight_N = torch.empty(9, device=device)
    weights = floats(3, 2, 24, 16), floats(3, 16, 24)
    return floats(5, 16), integers(9), weight_N, integers(4), *weights, integers(3), floats(3, 2, 24), floats(3, 16)


@pytest.mark.parametrize("way", [None, *CUDA_PATHS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_graph_of_cuda_tensors_holds_one_operator(
    dtype: torch.dtype, way: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing reads a value or asks for the device while it is traced, whatever path will run."""
    monkeypatch.setenv("MOETRAIN_CUDA_PATH", way or "")
    targets: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        targets.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    def doubled(*args: Any) -> Tensor:
        *tensors, slot_E, b_in, b_out = args
        return 2 * expert_mlp(*tensors, slot_E=slot_E, b_in=b_in, b_out=b_out)

    torch._dynamo.reset()
    with FakeTensorMode():
        args = fake_case(dtype)
        y_RD = torch.compile(doubled, backend=backend, fullgraph=True)(*args)
        assert (y_RD.shape, y_RD.device.type, y_RD.dtype) == ((5, 16), "cuda", dtype)
        _, h = OPS.expert_mlp(*args, "swiglu", True)
        gradients = OPS.expert_mlp_backward(y_RD, *args, h, "swiglu")
        likes = (args[0], args[2], *args[4:6], *args[7:])
        assert [grad.shape for grad in gradients] == [like.shape for like in likes]
    assert OPS.expert_mlp.default in targets or OPS.expert_mlp in targets


def trace_parts(way: str, dtype: torch.dtype = torch.bfloat16) -> None:
    """Forward and backward over tensors that have no values, on CUDA where torch is built for it."""
    device = "cuda" if torch.version.cuda else "cpu"
    with FakeTensorMode():
        args = fake_case(dtype, device)
        y_RD, h = forward_of_parts(ExpertInputs(*args), "swiglu", True, way)
        gradients = backward_of_parts(y_RD, ExpertInputs(*args), h, "swiglu", way)
        wanted = OPS.expert_mlp_backward(y_RD, *args, h, "swiglu")
        assert [(grad.shape, grad.dtype) for grad in gradients] == [(like.shape, like.dtype) for like in wanted]
        assert {tensor.device.type for tensor in (y_RD, h, *gradients)} == {device}


@pytest.mark.parametrize("way", ["simple", "grouped_mm"])
def test_nothing_waits_for_the_device(way: str) -> None:
    """Nor do strides and types break what torch demands of its grouped product on CUDA."""
    trace_parts(way)


def test_what_waits_or_does_not_fit_is_noticed() -> None:
    with pytest.raises(DataDependentOutputException):
        trace_parts("loop")
    # To torch 2.13 bf16 alone fits while tracing, in 2.15 fp32 does as well; in none of them float64.
    with pytest.raises(RuntimeError, match=r"Expected (inputs of BF16 type|mat_a to be Float32, BFloat16 or Float16)"):
        trace_parts("grouped_mm", torch.float64)
