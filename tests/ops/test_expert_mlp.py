"""expert_mlp's values and gradients, by every path that this machine can run, against a loop over experts."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.expert_cases import (
    DTYPES,
    SIZES,
    TAIL,
    Case,
    ExpertMlp,
    excess,
    int32,
    largest_error,
    make_case,
    of_parts,
    output_gradient,
    run,
)
from ops.isas import ISAS, NAMES
from torch import Tensor

from moetrain.ops import expert_mlp
from moetrain.ops.reference_expert_mlp import expert_mlp_backward_reference, expert_mlp_reference

ACTIVATIONS = ["swiglu", "gelu", "relu2"]
Results = dict[str, Tensor]

COMPOSED = {"simple": of_parts("simple"), "loop": of_parts("loop")}
ON_CUDA = [pytest.mark.gpu, pytest.mark.filterwarnings("default:expert_mlp runs from separate products")]


@pytest.fixture(params=[*ISAS, *COMPOSED, pytest.param("cuda", marks=ON_CUDA)])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[ExpertMlp, str]:
    """An implementation and its device."""
    if request.param in NAMES:
        monkeypatch.setenv("MOETRAIN_CPU_ISA", request.param)
    return COMPOSED.get(request.param, expert_mlp), "cuda" if request.param == "cuda" else "cpu"


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MOETRAIN_CPU_ISA", request.param)
    return request.param


@functools.cache
def judged_case(sizes: tuple[int, ...], dtype: torch.dtype, **options: Any) -> tuple[Case, Results, Results]:
    """A case, its exact results and torch's own: the same for every path, so computed for the first one alone."""
    case = make_case(list(sizes), dtype, **options)
    return case, run(expert_mlp_reference, case.double()), run(expert_mlp_reference, case)


def require_as_accurate_as_torch(mlp: ExpertMlp, sizes: list[int], dtype: torch.dtype, **options: Any) -> None:
    case, exact, torchs = judged_case(tuple(sizes), dtype, **options)
    over = excess(run(mlp, case), exact, torchs)
    assert max(over.values()) <= 0, over


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_as_accurate_as_torch(path: tuple[ExpertMlp, str], dtype: torch.dtype, activation: str, biases: bool) -> None:
    mlp, device = path
    require_as_accurate_as_torch(mlp, SIZES["uneven"], dtype, activation=activation, biases=biases, device=device)


@pytest.mark.parametrize("size", [(17, 33), (1, 1), (64, 32), (31, 95), (96, 160), (520, 200)], ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_widths(path: tuple[ExpertMlp, str], dtype: torch.dtype, activation: str, size: tuple[int, int]) -> None:
    mlp, device = path
    options = {"width": size[0], "hidden": size[1], "activation": activation, "device": device}
    require_as_accurate_as_torch(mlp, SIZES["many tiles"], dtype, rows=150, **options)


@pytest.mark.parametrize("rows", [1, 2, 300])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_lists(path: tuple[ExpertMlp, str], dtype: torch.dtype, sizes: list[int], rows: int) -> None:
    mlp, device = path
    require_as_accurate_as_torch(mlp, sizes, dtype, rows=rows, biases=True, device=device)


@pytest.mark.parametrize(("size", "ascending"), [((40, 24), False), ((64, 64), True), ((520, 70), True)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_lists(path: tuple[ExpertMlp, str], dtype: torch.dtype, size: tuple[int, int], ascending: bool) -> None:
    """More pairs of one expert, and more rows, than any kernel works on at a time."""
    mlp, device = path
    width, hidden = size
    sizes = [5, 0, 1700, 40, 800]
    options = {"width": width, "hidden": hidden, "ascending": ascending, "device": device}
    require_as_accurate_as_torch(mlp, sizes, dtype, rows=2300, **options)


@pytest.mark.parametrize("sizes", [[16_000], [5, 0, 16_100, 300]], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_sums_of_bias_gradients(isa: str, dtype: torch.dtype, sizes: list[int]) -> None:
    """So many pairs that one sum after another in fp32 is sixteen times as far off as torch's."""
    require_as_accurate_as_torch(expert_mlp, sizes, dtype, rows=2300, biases=True)


@pytest.mark.parametrize("width", [63, 1023, 1500])
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_rows_with_biases(isa: str, dtype: torch.dtype, width: int) -> None:
    """Widths at and off the ends of the blocks in which dY and the bias of w_out are multiplied."""
    require_as_accurate_as_torch(expert_mlp, [30, 0, 33], dtype, rows=50, width=width, hidden=8, biases=True)


def test_the_gradient_of_a_weight_is_a_sum_over_the_whole_width(isa: str) -> None:
    """Of dY and the bias, alone: twice torch's error and nothing beside it, since torch is not lucky in every sum."""
    case = make_case([130, 0, 233], torch.float32, rows=50, width=8192, hidden=8, biases=True)
    case = case.but(w_out=torch.zeros_like(case.w_out))
    exact, torchs, mine = (
        run(mlp, some)["dweight_N"]
        for mlp, some in ((expert_mlp_reference, case.double()), (expert_mlp_reference, case), (expert_mlp, case))
    )
    assert largest_error(mine, exact) <= 2 * largest_error(torchs, exact)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(path: tuple[ExpertMlp, str], dtype: torch.dtype) -> None:
    mlp, device = path
    case = make_case(SIZES["no pairs"], dtype, rows=0, biases=True, device=device)
    results = run(mlp, case)
    assert results["y_RD"].shape == (0, 40)
    for name in ("weight_N", "w_in", "w_out", "b_in", "b_out"):
        assert results[f"d{name}"].shape == getattr(case, name).shape
        assert not results[f"d{name}"].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_rule_notices_a_weight_and_swapped_projections(path: tuple[ExpertMlp, str], dtype: torch.dtype) -> None:
    mlp, device = path
    case = make_case(SIZES["uneven"], dtype, device=device)
    exact, torchs = run(expert_mlp_reference, case.double()), run(expert_mlp_reference, case)
    weight_N = case.weight_N.clone()
    weight_N[9] = 0
    dropped = excess(run(mlp, case.but(weight_N=weight_N)), exact, torchs)
    assert dropped["dweight_N"] <= 0, "a pair's gradient does not depend on its weight"
    assert all(over > 0 for name, over in dropped.items() if name != "dweight_N"), dropped
    swapped = excess(run(mlp, case.but(w_in=case.w_in.flip(1))), exact, torchs)
    assert min(swapped.values()) > 0, swapped


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tail_unused_slots_and_rows_without_pairs(
    path: tuple[ExpertMlp, str], dtype: torch.dtype, activation: str, biases: bool
) -> None:
    mlp, device = path
    case = make_case(SIZES["uneven"], dtype, activation=activation, biases=biases, device=device)
    x_RD, dy_RD = case.x_RD.clone(), output_gradient(case)
    x_RD[-1] = dy_RD[-1] = float("nan")  # a row that nothing reads
    assert case.slot_E is not None
    unused = sorted(set(range(7)) - set(case.slot_E.tolist()))
    w_in, w_out = case.w_in.clone(), case.w_out.clone()
    w_in[unused] = w_out[unused] = float("nan")
    results = run(mlp, case.but(x_RD=x_RD, w_in=w_in, w_out=w_out), dy_RD)
    assert all(value.isfinite().all() for value in results.values())
    assert not results["y_RD"][-1].any()
    assert not results["dx_RD"][-1].any()
    assert not results["dweight_N"][-TAIL:].any()
    assert results["dweight_N"][:-TAIL].all()
    assert len(unused) == 3
    for name in ("w_in", "w_out", *(("b_in", "b_out") if biases else ())):
        assert not results[f"d{name}"][unused].any()
        assert results[f"d{name}"].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_slots_expert_e_uses_slot_e(path: tuple[ExpertMlp, str], dtype: torch.dtype) -> None:
    mlp, device = path
    case = make_case(SIZES["uneven"], dtype, biases=True, device=device)
    assert case.b_in is not None
    assert case.b_out is not None
    plain = case.but(w_in=case.w_in[:5], w_out=case.w_out[:5], b_in=case.b_in[:5], b_out=case.b_out[:5], slot_E=None)
    over = excess(run(mlp, plain), run(expert_mlp_reference, plain.double()), run(expert_mlp_reference, plain))
    assert max(over.values()) <= 0, over


def test_adds_experts_in_ascending_order(path: tuple[ExpertMlp, str]) -> None:
    mlp, device = path
    w_in = torch.ones(3, 1, 1, 1, device=device)
    big = 2.0**30
    for weights, expected in (([big, -big, 1.0], 1.0), ([1.0, big, -big], 0.0)):
        weight_N = torch.tensor(weights, device=device)
        row_N, offset_E1 = int32([0, 0, 0], device), int32([0, 1, 2, 3], device)
        x_RD = torch.ones(1, 1, device=device)
        kwargs = {"slot_E": None, "b_in": None, "b_out": None, "activation": "relu2"}
        assert mlp(x_RD, row_N, weight_N, offset_E1, w_in, w_in[:, 0], **kwargs).item() == expected


def _sparse_integers(random: torch.Generator, rows: int, columns: int, most: int) -> Tensor:
    """Rows of zeros but for at most ``most`` ones and minus ones: sums along them stay small."""
    picked = torch.rand(rows, columns, generator=random).argsort(dim=1) < most
    return torch.where(picked, torch.randint(0, 2, (rows, columns), generator=random) * 2 - 1, 0)


def integer_case(draw: Callable[..., Any]) -> tuple[Case, Tensor]:
    """Small whole numbers, so that every product that is rounded, even to bfloat16, is exact. And dy."""
    sizes = draw(st.lists(st.integers(0, 40), max_size=5))
    rows, width, hidden = draw(st.integers(1, 50)), draw(st.integers(1, 70)), draw(st.integers(1, 70))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    num_pairs, num_slots = sum(sizes), 3
    case = Case(
        _sparse_integers(random, rows, width, 4),
        int32(torch.randint(rows, (num_pairs,), generator=random)),
        torch.randint(-2, 3, (num_pairs,), generator=random),
        int32(torch.tensor([0, *sizes]).cumsum(0)),
        torch.randint(-1, 2, (num_slots, 1, hidden, width), generator=random),
        torch.randint(-1, 2, (num_slots, width, hidden), generator=random),
        int32(torch.randint(num_slots, (len(sizes),), generator=random)),
        None,
        None,
        "relu2",
    )
    return case, _sparse_integers(random, rows, width, 8)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_whole_numbers_are_exact_to_the_bit(isa: str, data: st.DataObject) -> None:
    integers, dy_RD = integer_case(data.draw)
    floats = {name: getattr(integers, name).double() for name in ("x_RD", "weight_N", "w_in", "w_out")}
    wanted = run(expert_mlp_reference, integers.but(**floats), dy_RD.double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOETRAIN_CPU_ISA", isa)
        for dtype in DTYPES:
            case = integers.but(**{name: value.to(dtype) for name, value in floats.items()})
            case = case.but(weight_N=floats["weight_N"].to(torch.promote_types(dtype, torch.float32)))
            for name, value in run(expert_mlp, case, dy_RD.to(dtype)).items():
                assert torch.equal(value, wanted[name].to(value.dtype)), (name, dtype)


@pytest.mark.parametrize("recompute_h", [False, True])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient(isa: str, activation: str, biases: bool, recompute_h: bool) -> None:
    case = make_case([2, 0, 3], torch.float64, rows=4, width=3, hidden=2, activation=activation, biases=biases).leaves()
    inputs = [case.x_RD, case.weight_N, case.w_in, case.w_out]
    inputs += [bias for bias in (case.b_in, case.b_out) if bias is not None]

    def mlp(x_RD: Tensor, weight_N: Tensor, w_in: Tensor, w_out: Tensor, *b: Tensor) -> Tensor:
        b_in, b_out = b or (None, None)
        changed = case.but(x_RD=x_RD, weight_N=weight_N, w_in=w_in, w_out=w_out, b_in=b_in, b_out=b_out)
        return expert_mlp(*changed.args(), **changed.kwargs(), recompute_h=recompute_h)

    with torch.no_grad():
        case.weight_N[5:] = 1.0  # finite differences move the tail too
    torch.autograd.gradcheck(mlp, inputs)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_papers_backward_equals_autograd(activation: str, biases: bool) -> None:
    case = make_case(SIZES["uneven"], torch.float64, activation=activation, biases=biases)
    wanted = run(expert_mlp_reference, case)
    got = expert_mlp_backward_reference(output_gradient(case), *case.args(), **case.kwargs())
    for name, value in wanted.items():
        if name != "y_RD":
            torch.testing.assert_close(getattr(got, name), value, rtol=0, atol=1e-12)
    wrong = expert_mlp_backward_reference(
        output_gradient(case), *case.but(w_out=case.w_out * (1 + 1e-9)).args(), **case.kwargs()
    )
    assert (wrong.dweight_N - wanted["dweight_N"])[:-TAIL].abs().max() > 1e-12


def test_unknown_activation_is_named(path: tuple[ExpertMlp, str]) -> None:
    mlp, device = path
    case = make_case(SIZES["uneven"], torch.float32, device=device)
    with pytest.raises(ValueError, match=r"activation must be.*swiglu.*gelu.*relu2.*got.*tanh"):
        mlp(*case.args(), **(case.kwargs() | {"activation": "tanh"}))
