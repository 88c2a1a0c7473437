"""expert_mlp's CUDA side as it stands in csrc/ops, its launchers and kernels, run on the host against a reference."""

from pathlib import Path

import pytest
import torch
from emulated_operators import ARCHITECTURES, LAUNCHERS, load_operator, source_of
from torch import Tensor

from moetrain.ops.reference_expert_mlp import expert_mlp_backward_reference, expert_mlp_reference

pytestmark = pytest.mark.slow  # two minutes of compilation

OPERATOR = source_of("expert_mlp")
SUMS = ["rows/scatter_add_rows.cu", "routing/group_pairs.cu"]

# What breaks between the operator's inputs and its launches, and what is then wrong.
MUTANTS = [
    (".a_stride = row_stride(rows)", ".a_stride = 0", "y: error"),
    ("w.size(0) > 1 ? w.stride(0) : 0", "0", "y: error"),
    (
        ".slots = data_or_null<int32_t>(in.slot_E),\n                .num_a_rows",
        ".slots = nullptr,\n                .num_a_rows",
        "y: er",
    ),
    ("lists(call.in.slot_E, call.in.num_slots(), call.stream)", "lists()", "dw_out: error|dw_in: error"),
    (".weight = gathers ? call.weight : nullptr", ".weight = nullptr", "db_out: error"),
    ("if (!h_NP) call.project_up(bf16_data(dh), call.columns, nullptr);", "", "dx: error"),
]


@pytest.fixture(scope="module")
def emulated() -> torch._ops._OpNamespace:
    """The operators as they stand."""
    return load_operator("moetrain_emulated", "expert_mlp", SUMS, OPERATOR.read_text())


def bf16(random: torch.Generator, *sizes: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(sizes, generator=random) * scale).bfloat16()


class Case:
    """Inputs of one call; with `slots`, experts share them and one is nobody's; rows of x and dy have gaps."""

    def __init__(self, seed: int, activation: str, width: int, hidden: int, *, biases: bool, slots: bool) -> None:
        random = torch.Generator().manual_seed(seed)
        sizes = [0, 70, 1, 0, 130, 9]
        self.activation = activation
        parts = 2 if activation == "swiglu" else 1
        num_slots = 5 if slots else len(sizes)
        self.slot_E = torch.tensor([3, 0, 4, 2, 0, 3], dtype=torch.int32) if slots else None
        self.offset_E1 = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32)
        length, beyond, rows = sum(sizes), 20, 61
        row_N = torch.randint(0, rows - 1, (length + beyond,), generator=random)  # one row has no pairs
        row_N[length:] = 1 << 30
        self.row_N = row_N.int()
        self.weight_N = torch.rand(length + beyond, generator=random)
        self.x_RD = bf16(random, rows, width + 8)[:, :width]
        self.dy_RD = bf16(random, rows, width + 4)[:, :width]  # not aligned: copied
        self.w_in = bf16(random, num_slots + 1, parts, hidden, width, scale=width**-0.5)[1:]
        self.w_out = bf16(random, 2 * num_slots, width, hidden, scale=hidden**-0.5)[::2]
        self.b_in = bf16(random, num_slots, parts, hidden) if biases else None
        self.b_out = bf16(random, num_slots, width) if biases else None
        self.length = length

    def head(self) -> tuple[Tensor | None, ...]:
        return (
            self.x_RD, self.row_N, self.weight_N, self.offset_E1, self.w_in, self.w_out,
            self.slot_E, self.b_in, self.b_out,
        )  # fmt: skip

    def for_reference(self) -> tuple[tuple[Tensor, ...], dict[str, Tensor | str | None]]:
        def wide(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.double()

        tensors = (self.x_RD.double(), self.row_N[: self.length], self.weight_N[: self.length].double())
        options = {"slot_E": self.slot_E, "b_in": wide(self.b_in), "b_out": wide(self.b_out)}
        weights = (self.offset_E1, self.w_in.double(), self.w_out.double())
        return (*tensors, *weights), {**options, "activation": self.activation}


def require_close(name: str, actual: Tensor, expected: Tensor) -> None:
    """Every element within bf16 rounding of operands and sums, at the scale of the largest."""
    assert actual.shape == expected.shape, name
    error = (actual.double() - expected).abs().max() if expected.numel() else torch.zeros(())
    scale = expected.abs().max() if expected.numel() else torch.zeros(())
    assert error <= 0.02 * scale + 1e-6, f"{name}: error {error:.3g} at scale {scale:.3g}"


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whose kernels run."""
    monkeypatch.setenv("MOETRAIN_CUDA_PATH", request.param)
    return request.param


@pytest.mark.usefixtures("architecture")
@pytest.mark.parametrize(
    ("activation", "width", "hidden", "biases", "slots"),
    [
        ("swiglu", 72, 104, False, False),
        ("swiglu", 136, 64, True, True),
        ("gelu", 64, 136, True, False),
        ("relu2", 200, 72, False, True),
    ],
)
def test_values_and_gradients(
    emulated: torch._ops._OpNamespace, activation: str, width: int, hidden: int, biases: bool, slots: bool
) -> None:
    require_right(emulated, Case(1, activation, width, hidden, biases=biases, slots=slots))


def require_right(emulated: torch._ops._OpNamespace, case: Case) -> None:
    """Values and gradients are those of the reference, with H kept and without."""
    activation = case.activation
    y_RD, h = emulated.expert_mlp(*case.head(), activation, True)
    without_h, _ = emulated.expert_mlp(*case.head(), activation, False)
    tensors, options = case.for_reference()
    require_close("y", y_RD, expert_mlp_reference(*tensors, **options))  # type: ignore[arg-type]
    assert torch.equal(y_RD, without_h)

    expected = expert_mlp_backward_reference(case.dy_RD.double(), *tensors, **options)  # type: ignore[arg-type]
    for kept in (h, None):
        gradients = emulated.expert_mlp_backward(case.dy_RD, *case.head(), kept, activation)
        dx_RD, dweight_N, dw_in, dw_out, db_in, db_out = gradients
        require_close("dx", dx_RD, expected.dx_RD)
        require_close("dweight", dweight_N[: case.length], expected.dweight_N)
        assert not dweight_N[case.length :].any()
        require_close("dw_in", dw_in, expected.dw_in)
        require_close("dw_out", dw_out, expected.dw_out)
        if expected.db_in is not None and expected.db_out is not None:
            require_close("db_in", db_in, expected.db_in)
            require_close("db_out", db_out, expected.db_out)
        else:
            assert db_in.numel() == db_out.numel() == 0


@pytest.mark.parametrize("mutant_idx", range(len(MUTANTS)))
def test_a_broken_operator_is_noticed(mutant_idx: int) -> None:
    old, new, symptom = MUTANTS[mutant_idx]
    text = OPERATOR.read_text()
    assert old in text, f"the text to replace is not in {OPERATOR.name}: {old}"
    broken = load_operator(f"moetrain_broken_{mutant_idx}", "expert_mlp", SUMS, text.replace(old, new))
    with pytest.raises(AssertionError, match=symptom):
        require_right(broken, Case(1, "swiglu", 136, 64, biases=True, slots=True))


@pytest.mark.usefixtures("architecture")
def test_nothing_to_do(emulated: torch._ops._OpNamespace) -> None:
    case = Case(2, "swiglu", 64, 64, biases=True, slots=False)
    none = torch.zeros(0, dtype=torch.int32)
    head = (case.x_RD, none, torch.zeros(0), torch.zeros(7, dtype=torch.int32), *case.head()[4:])
    y_RD, h = emulated.expert_mlp(*head, "swiglu", True)
    assert h.shape[0] == 0
    for tensor in (y_RD, *emulated.expert_mlp_backward(case.dy_RD, *head, h, "swiglu")):
        assert not tensor.any()


@pytest.mark.usefixtures("architecture")
def test_no_slots(emulated: torch._ops._OpNamespace) -> None:
    case = Case(2, "swiglu", 64, 64, biases=True, slots=True)
    assert case.b_in is not None
    assert case.b_out is not None
    x_RD, row_N, weight_N, *_, slot_E, _, _ = case.head()
    stacks = [t[:0] for t in (case.w_in, case.w_out, case.b_in, case.b_out)]
    head = (x_RD, row_N, weight_N, torch.zeros_like(case.offset_E1), *stacks[:2], slot_E, *stacks[2:])
    y_RD, h = emulated.expert_mlp(*head, "swiglu", True)
    for tensor in (y_RD, *emulated.expert_mlp_backward(case.dy_RD, *head, h, "swiglu")):
        assert not tensor.any()


@pytest.mark.usefixtures("architecture")
def test_all_slots_may_have_one_bias_but_not_one_matrix(emulated: torch._ops._OpNamespace) -> None:
    case = Case(5, "swiglu", 64, 64, biases=True, slots=True)
    assert case.b_in is not None
    assert case.b_out is not None
    case.b_in, case.b_out = (t[:1].expand(t.shape) for t in (case.b_in, case.b_out))
    require_right(emulated, case)
    for name in ("w_in", "w_out"):
        shared = Case(5, "swiglu", 64, 64, biases=False, slots=True)
        w = getattr(shared, name)
        setattr(shared, name, w[:1].expand(w.shape))
        with pytest.raises(ValueError, match=rf"a matrix of its own for each slot of {name}, got strides \[0, "):
            emulated.expert_mlp(*shared.head(), "swiglu", False)


def test_what_the_kernels_cannot_take_is_refused(emulated: torch._ops._OpNamespace) -> None:
    case = Case(3, "swiglu", 64, 60, biases=False, slots=False)
    with pytest.raises(ValueError, match="D and F to be multiples of 8, got 64 and 60; set MOETRAIN_CUDA_PATH=simple"):
        emulated.expert_mlp(*case.head(), "swiglu", False)


@pytest.mark.usefixtures("architecture")
def test_bad_lists_are_refused_before_a_launch(
    emulated: torch._ops._OpNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOETRAIN_DEBUG", "1")
    case = Case(3, "swiglu", 64, 64, biases=False, slots=True)
    assert case.slot_E is not None
    row_N, offset_E1, slot_E = case.row_N.clone(), case.offset_E1.clone(), case.slot_E.clone()
    row_N[7], slot_E[2] = 61, -1
    offset_E1[2] = 300
    for position, bad, text in (
        (1, row_N, r"expert_mlp: row\[7\] is 61, but the number of rows of x is 61"),
        (3, offset_E1, r"offset must not fall, got offset\[2\] = 300 and offset\[3\]"),
        (6, slot_E, r"slot\[2\] is -1, but the number of slots is 5"),
    ):
        head = list(case.head())
        head[position] = bad
        with pytest.raises(ValueError, match=text):
            emulated.expert_mlp(*head, "swiglu", False)
        with pytest.raises(ValueError, match=text):
            emulated.expert_mlp_backward(case.dy_RD, *head, None, "swiglu")


def test_every_launcher_is_built() -> None:
    names = {Path(name).stem for name in LAUNCHERS}
    assert names >= {"sums", *(f"{kernel}_{sm}" for kernel in ("up_gemm", "varlen_k_gemm") for sm in ARCHITECTURES)}
