"""What expert_mlp promises beside its values: bits, memory, registration, errors."""

import dataclasses
import functools
from typing import Any

import pytest
import torch
from ops.expert_cases import SIZES, Case, int32, make_case, output_gradient, run
from ops.isas import ISAS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moetrain import _C
from moetrain.ops import expert_mlp

ACTIVATIONS = ["swiglu", "gelu", "relu2"]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MOETRAIN_CPU_ISA", request.param)
    return request.param


def require_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.any(), name
        assert torch.equal(value, b[name]), name


@pytest.mark.parametrize("recompute_h", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ascending", [False, True])
@pytest.mark.parametrize("sizes", [[900, 0, 130, 3, 90], [0, 700, 0]], ids=str)
def test_bits_for_any_number_of_threads_and_for_repeats(
    isa: str, sizes: list[int], ascending: bool, dtype: torch.dtype, recompute_h: bool
) -> None:
    case = make_case(sizes, dtype, rows=1000, width=72, hidden=48, biases=True, ascending=ascending)
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 3, 3):
            torch.set_num_threads(num_threads)
            results.append(run(expert_mlp, case, recompute_h=recompute_h))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        require_same_bits(results[0], result)
    assert other_order_has_other_bits(isa, tuple(sizes), ascending, dtype)


@functools.cache
def other_order_has_other_bits(isa: str, sizes: tuple[int, ...], ascending: bool, dtype: torch.dtype) -> bool:
    """The sums that could run in another order are there: pairs the other way round give other bits.

    Few sums differ enough to show once they are rounded to bf16, so there are many of them. ``isa`` is what runs.
    """
    many = make_case(list(sizes), dtype, rows=1000, width=520, hidden=200, ascending=ascending)
    backwards = torch.cat(
        [torch.arange(end - size, end).flip(0) for size, end in zip(sizes, many.offset_E1[1:].tolist(), strict=True)]
    )
    order = torch.cat((backwards, torch.arange(sum(sizes), len(many.row_N))))
    other = run(expert_mlp, many.but(row_N=many.row_N[order], weight_N=many.weight_N[order]))
    return not torch.equal(other["dw_in"], run(expert_mlp, many)["dw_in"])


@pytest.mark.parametrize("recompute_h", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bits_for_any_number_of_waves(isa: str, dtype: torch.dtype, recompute_h: bool) -> None:
    """One thread takes this backward pass in three waves of experts, five threads in two, seven in one."""
    case = make_case([4600, 0, 5000, 3, 3600, 40], dtype, rows=5001, width=40, hidden=24, biases=True, ascending=True)
    case = case.but(slot_E=torch.tensor([5, 0, 1, 4, 2, 3], dtype=torch.int32))  # no slot is shared
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 5, 7):
            torch.set_num_threads(num_threads)
            results.append(run(expert_mlp, case, recompute_h=recompute_h))
    finally:
        torch.set_num_threads(before)
    require_same_bits(results[0], results[1])
    require_same_bits(results[0], results[2])
    assert not torch.equal(run(expert_mlp, case.but(weight_N=case.weight_N * 1.01))["dx_RD"], results[0]["dx_RD"])


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_recomputing_h_changes_no_bit(isa: str, dtype: torch.dtype, activation: str, biases: bool) -> None:
    case = make_case(SIZES["many tiles"], dtype, rows=90, activation=activation, biases=biases)
    cached, recomputed = run(expert_mlp, case), run(expert_mlp, case, recompute_h=True)
    require_same_bits(cached, recomputed)


def test_a_row_does_not_depend_on_the_others(isa: str) -> None:
    """What a checkpointed or differently cut micro-batch relies on: only sums over rows may change with the rest."""
    case = make_case([40, 70], torch.bfloat16, rows=80)
    few = case.but(row_N=case.row_N[40:53], weight_N=case.weight_N[40:53], offset_E1=int32([0, 0, 10]))
    alone = case.but(row_N=case.row_N[40:], weight_N=case.weight_N[40:], offset_E1=int32([0, 0, 70]))
    only_few = [r for r in set(few.row_N[:10].tolist()) if (alone.row_N[:70] == r).sum() == (few.row_N[:10] == r).sum()]
    mine, theirs = run(expert_mlp, few), run(expert_mlp, alone)
    assert len(only_few) > 2
    for name in ("y_RD", "dx_RD"):
        assert torch.equal(mine[name][only_few], theirs[name][only_few])
        assert not torch.equal(mine[name], theirs[name])
    assert torch.equal(mine["dweight_N"][:10], theirs["dweight_N"][:10])


@pytest.mark.parametrize("how", ["preserved", "data", "storage"])
def test_weights_that_change_behind_their_version_counter_are_read_again(isa: str, how: str) -> None:
    case = make_case(SIZES["uneven"], torch.bfloat16)
    first = run(expert_mlp, case)
    for w in (case.w_in, case.w_out):
        version = w._version
        if how == "preserved":
            with torch.autograd._unsafe_preserve_version_counter(w):
                w.mul_(-2)
        elif how == "data":
            w.data.mul_(-2)
        else:  # as a store refills its flat chunks
            torch.empty(0, dtype=w.dtype).set_(w.untyped_storage(), w.storage_offset(), w.shape, w.stride()).mul_(-2)
        assert w._version == version
    fresh = case.but(w_in=case.w_in.clone(), w_out=case.w_out.clone())
    second = run(expert_mlp, case)
    require_same_bits(second, run(expert_mlp, fresh))
    assert not torch.equal(first["y_RD"], second["y_RD"])


def saved_by(case: Case, **options: Any) -> list[Tensor]:
    """Every tensor that the backward pass keeps alive, weights apart."""
    saved: list[Tensor] = []
    leaves = case.leaves()

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        expert_mlp(*leaves.args(), **(leaves.kwargs() | options))
    weights = [leaves.w_in, leaves.w_out]
    assert all(any(tensor is p or tensor.data_ptr() == p.data_ptr() for tensor in saved) for p in weights)
    parameters = weights + [bias for bias in (leaves.b_in, leaves.b_out) if bias is not None]
    return [t for t in saved if not any(t.data_ptr() == p.data_ptr() for p in parameters)]


@pytest.mark.parametrize("biases", [False, True])
def test_saves_rows_h_and_metadata_alone(isa: str, biases: bool) -> None:
    rows, width, hidden = 40, 48, 64
    sizes = SIZES["many tiles"]
    case = make_case(sizes, torch.bfloat16, rows=rows, width=width, hidden=hidden, biases=biases)
    num_pairs, num_experts = case.row_N.shape[0], len(sizes)
    metadata = 8 * num_pairs + 4 * (num_experts + 1) + 4 * num_experts
    saved = saved_by(case)
    assert sum(t.nbytes for t in saved) == 2 * rows * width + 4 * num_pairs * hidden + metadata
    lean = saved_by(case, recompute_h=True)
    assert sum(t.nbytes for t in lean) == 2 * rows * width + metadata
    with torch.no_grad():
        assert not expert_mlp(*case.args(), **case.kwargs()).requires_grad


class Made(TorchDispatchMode):
    """The bytes of every tensor that an operator returned anew, by the operator's name."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and all(leaf.data_ptr() != one.data_ptr() for one in given):
                self.bytes[func.name()] = self.bytes.get(func.name(), 0) + leaf.nbytes
        return out


@pytest.mark.parametrize("recompute_h", [False, True])
def test_the_backward_makes_the_gradients_and_nothing_beside_them(recompute_h: bool) -> None:
    """What autograd adds of its own accord would be as large as H."""
    case = make_case(SIZES["many tiles"], torch.bfloat16).leaves()
    leaves = (case.x_RD, case.weight_N, case.w_in, case.w_out)
    y_RD = expert_mlp(*case.args(), **case.kwargs(), recompute_h=recompute_h)
    dy_RD = output_gradient(case)
    with Made() as made:
        torch.autograd.grad(y_RD, leaves, dy_RD)
    assert made.bytes == {"moetrain::expert_mlp_backward": sum(leaf.nbytes for leaf in leaves)}


@pytest.mark.parametrize(
    ("activation", "hidden", "columns"), [("swiglu", 33, 128), ("gelu", 33, 64), ("relu2", 65, 128)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_h_is_padded_to_blocks(isa: str, dtype: torch.dtype, activation: str, hidden: int, columns: int) -> None:
    case = make_case(SIZES["uneven"], dtype, hidden=hidden, activation=activation)
    _, h = torch.ops.moetrain.expert_mlp(*case.positional(), True)
    assert (h.shape, h.dtype) == ((case.row_N.shape[0], columns), dtype)
    _, h = torch.ops.moetrain.expert_mlp(*case.positional(), False)
    assert h.shape == (0,)


def full_list(case: Case) -> Case:
    """Without a tail, where h would hold whatever memory held."""
    n = case.num_pairs
    return case.but(row_N=case.row_N[:n], weight_N=case.weight_N[:n])


@pytest.mark.parametrize("save_h", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_registration(biases: bool, save_h: bool) -> None:
    case = full_list(make_case(SIZES["uneven"], torch.float32, hidden=32, biases=biases)).leaves()
    torch.library.opcheck(torch.ops.moetrain.expert_mlp.default, (*case.positional(), save_h))


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("biases", [False, True])
def test_registration_of_the_backward(biases: bool, saved: bool) -> None:
    case = full_list(make_case(SIZES["uneven"], torch.float32, hidden=32, biases=biases))
    _, h = torch.ops.moetrain.expert_mlp(*case.positional(), True)
    *tensors, activation = case.positional()
    args = (torch.ones_like(case.x_RD), *tensors, h if saved else None, activation)
    torch.library.opcheck(torch.ops.moetrain.expert_mlp_backward.default, args)


@pytest.mark.parametrize("recompute_h", [False, True])
def test_compiles_in_one_graph(recompute_h: bool) -> None:
    case = make_case(SIZES["uneven"], torch.float64, biases=True).leaves()
    assert case.b_in is not None
    assert case.b_out is not None
    leaves = [case.x_RD, case.weight_N, case.w_in, case.w_out, case.b_in, case.b_out]

    def half(*leaves: Tensor) -> Tensor:
        x_RD, weight_N, w_in, w_out, b_in, b_out = leaves
        changed = case.but(x_RD=x_RD, weight_N=weight_N, w_in=w_in, w_out=w_out, b_in=b_in, b_out=b_out)
        return 0.5 * expert_mlp(*changed.args(), **changed.kwargs(), recompute_h=recompute_h)

    compiled = torch.compile(half, backend="aot_eager", fullgraph=True)
    expected = torch.autograd.grad(half(*leaves).square().sum(), leaves)
    for grad, wanted in zip(torch.autograd.grad(compiled(*leaves).square().sum(), leaves), expected, strict=True):
        assert torch.equal(grad, wanted)


def test_only_wanted_gradients_are_returned() -> None:
    case = make_case(SIZES["uneven"], torch.float32, biases=True)
    x_RD = case.x_RD.clone().requires_grad_()
    y_RD = expert_mlp(x_RD, *case.args()[1:], **case.kwargs())
    y_RD.sum().backward()
    assert x_RD.grad is not None
    assert x_RD.grad.any()
    for field in dataclasses.fields(case):
        value = getattr(case, field.name)
        assert not isinstance(value, Tensor) or value.grad is None


class _NoGradient(torch.autograd.Function):
    """The identity, whose gradient is that of something unused."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> None:
        return None


def test_an_output_without_gradient_gives_none() -> None:
    case = make_case(SIZES["uneven"], torch.float32).leaves()
    y_RD = expert_mlp(*case.args(), **case.kwargs())
    (_NoGradient.apply(y_RD).sum() + case.x_RD.sum()).backward()
    assert case.w_in.grad is None
    assert case.x_RD.grad is not None
    assert torch.equal(case.x_RD.grad, torch.ones_like(case.x_RD))


CASE = make_case([1, 3], torch.float32, rows=5, width=3, hidden=2, biases=True)
assert CASE.b_in is not None
assert CASE.b_out is not None


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"x_RD": CASE.x_RD[0]}, ValueError, r"expert_mlp: x must be \[R, D\], got \[3\]"),
        ({"x_RD": CASE.x_RD[:, :0]}, ValueError, r"x must have D >= 1 columns, got \[5, 0\]"),
        ({"x_RD": CASE.x_RD.int()}, TypeError, "expert_mlp: x must be float32.*got Int"),
        ({"x_RD": CASE.x_RD.t().contiguous().t()}, ValueError, "the last dimension of x must have stride 1"),
        ({"row_N": CASE.row_N.long()}, TypeError, "row must be Int, got Long"),
        ({"row_N": int32([0, 1, 5, 0, 0, 0, 0])}, ValueError, r"row\[2\] is 5, but the number of rows of x is 5"),
        ({"row_N": int32([0, -1, 2, 0, 0, 0, 0])}, ValueError, r"row\[1\] is -1, but the number of rows of x is 5"),
        ({"weight_N": CASE.weight_N.double()}, TypeError, "weight must be Float, got Double"),
        ({"weight_N": CASE.weight_N[:3]}, ValueError, r"weight must be \[N\].*got \[3\]"),
        ({"offset_E1": int32([0, 1, 9])}, ValueError, r"offset\[-1\] is 9, beyond the list's capacity of 7"),
        ({"offset_E1": int32([0, 3, 2])}, ValueError, r"offset must not fall, got offset\[1\] = 3 and offset\[2\] = 2"),
        ({"offset_E1": int32([1, 2, 4])}, ValueError, "offset must start at 0"),
        ({"offset_E1": int32([0, 1, 2, 4])}, ValueError, r"slot must have one entry per .*\(3\), got 2"),
        (
            {"w_in": CASE.w_in[:, :, :0], "w_out": CASE.w_out[:, :, :0], "b_in": CASE.b_in[:, :, :0]},
            ValueError,
            r"w_in must have F >= 1 rows, got \[4, 2, 0, 3\]",
        ),
        ({"w_in": CASE.w_in[0]}, ValueError, r"w_in must be \[slots, .*, F, D\], got \[2, 2, 3\]"),
        ({"w_in": CASE.w_in[:, :1]}, ValueError, "w_in must"),
        ({"activation": "gelu"}, ValueError, "w_in must"),
        ({"w_in": CASE.w_in.double()}, TypeError, r"w_in must have the dtype of x \(Float\), got Double"),
        ({"w_in": CASE.w_in.mT.contiguous().mT}, ValueError, "w_in must"),
        ({"w_out": CASE.w_out[:2]}, ValueError, "w_out must"),
        ({"w_out": CASE.w_out[:, :2]}, ValueError, "w_out must"),
        ({"slot_E": int32([0, 4])}, ValueError, r"slot\[1\] is 4, but the number of slots is 4"),
        ({"slot_E": None}, ValueError, r"without slot there must be one slot per .*\(2\), got 4 slots"),
        ({"b_in": CASE.b_in[:, :1]}, ValueError, "b_in must be"),
        ({"b_out": CASE.b_out.double()}, TypeError, r"b_out must have the dtype of x \(Float\), got Double"),
        ({"activation": "tanh"}, ValueError, r"activation must be.*swiglu.*gelu.*relu2.*got.*tanh"),
    ],
)
def test_errors_name_the_argument_and_what_came(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    case = CASE.but(**changes)
    with pytest.raises(error, match=text):
        expert_mlp(*case.args(), **case.kwargs())


def test_an_unknown_path_is_refused_with_those_that_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOETRAIN_CPU_ISA", "sse9")
    with pytest.raises(
        ValueError, match=r"MOETRAIN_CPU_ISA.*" + _C.cpu_isas()[0] + r".*sse9|MOETRAIN_CPU_ISA.*sse9.*portable"
    ):
        expert_mlp(*CASE.args(), **CASE.kwargs())


def test_a_path_that_is_not_compiled_in_is_refused_with_those_that_are(monkeypatch: pytest.MonkeyPatch) -> None:
    left_out = set(_C.machine_isas()) - set(_C.built_isas())
    if not left_out:
        pytest.skip("this build has every path of this machine; tests/launch/native/test_isas.py has others")
    for isa in left_out:
        monkeypatch.setenv("MOETRAIN_CPU_ISA", isa)
        with pytest.raises(ValueError, match=f"{_C.cpu_isas()[0]}.*got {isa}; .*MOETRAIN_BUILD_ISA=all"):
            expert_mlp(*CASE.args(), **CASE.kwargs())


def test_paths_are_named_best_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOETRAIN_CPU_ISA", raising=False)
    isas = _C.cpu_isas()
    assert isas == [isa for isa in ("amx", "avx512_bf16", "avx512", "avx2", "portable") if isa in isas]
    assert isas[-1] == "portable"
    assert _C.cpu_isa() == isas[0]
    monkeypatch.setenv("MOETRAIN_CPU_ISA", "portable")
    assert _C.cpu_isa() == "portable"


# AVX512_BF16 and AMX multiply bf16 alone; other dtypes run on what comes next.
OTHER_DTYPES_RUN_ON = {"amx": "avx512", "avx512_bf16": "avx512", "amx_emulated": "portable"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_a_forced_path_is_what_the_kernels_are_compiled_for(isa: str, dtype: str) -> None:
    assert _C.cpu_isa() == isa
    assert _C.kernel_isa(dtype) == (isa if dtype == "bfloat16" else OTHER_DTYPES_RUN_ON.get(isa, isa))


def test_without_a_forced_path_the_best_kernels_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOETRAIN_CPU_ISA", raising=False)
    assert _C.kernel_isa("bfloat16") == _C.cpu_isas()[0]


def test_kernels_of_an_unknown_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match="kernel_isa: dtype must be bfloat16, float16, float32 or float64, got int8"):
        _C.kernel_isa("int8")


@pytest.mark.parametrize(("argument", "name"), [("offset_E1", "offset"), ("slot_E", "slot"), ("row_N", "row")])
def test_errors_about_devices_name_x(argument: str, name: str) -> None:
    case = CASE.but(**{argument: getattr(CASE, argument).to("meta")})
    on_cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with pytest.raises(ValueError, match=rf"expert_mlp: {name} is on meta but x is on cpu; move one with \.to\(\)"):
        torch.ops.moetrain.expert_mlp.default.redispatch(on_cpu, *case.positional(), False)
