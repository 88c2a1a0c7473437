"""expert_mlp's CUDA side as it stands in csrc/ops, its launchers and kernels, run on the host against a reference.

The operator is compiled against stand-ins for torch's CUDA headers, the launchers against the emulation. What this
shows: pointers, strides, shapes, order and lists that the operator hands to the kernels.
"""

import re
from pathlib import Path

import pytest
import torch
from emulated_kernels import BUILD, CSRC, FLAGS, TESTS, compile_to, hash_of, inputs_of, rewrite_kernel
from emulated_kernels import tests_of as cpp_of_tests
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from moetrain.ops.reference_expert_mlp import expert_mlp_backward_reference, expert_mlp_reference

pytestmark = pytest.mark.slow  # a minute of compilation

GLUE = TESTS / "torch"
LAUNCHERS = ["scatter_add_rows.cu", "group_pairs.cu"]
LAUNCHERS += sorted(
    str(path.relative_to(CSRC / "cuda"))
    for folder in ("expert_mlp", "grouped_gemm_sm90", "expert_mlp_sm90")
    for path in (CSRC / "cuda" / folder).glob("*.cu")
)


OPERATOR = CSRC / "ops" / "expert_mlp_cuda.cpp"
FOLDER = BUILD / "operator"

# What breaks between the operator's inputs and its launches, and what is then wrong.
MUTANTS = [
    (".a_stride = row_stride(rows)", ".a_stride = 0", "y: error"),
    ("w.size(0) > 1 ? w.stride(0) : 0", "0", "y: error"),
    (
        ".slots = index_data(in.slot_E),\n                .num_a_rows",
        ".slots = nullptr,\n                .num_a_rows",
        "y: er",
    ),
    ("if (call.in.slot_E) list_groups_of_slots();", "", "dw_out: error|dw_in: error"),
    (".weight = gathers ? call.weight : nullptr", ".weight = nullptr", "db_out: error"),
    ("if (!h_NP) call.project_up(data_of(dh), call.columns, nullptr);", "", "dx: error"),
]


def write_launch_header() -> Path:
    """A copy of launch_kernel.cuh that launches under emulation."""
    header = FOLDER / "include" / "cuda" / "grouped_gemm" / "launch_kernel.cuh"
    header.parent.mkdir(parents=True, exist_ok=True)
    text = (CSRC / "cuda" / "grouped_gemm" / "launch_kernel.cuh").read_text()
    emulated_launch = r"moetrain::emulation::launch(\1)(kernel, arguments)"
    text, count = re.subn(r"kernel<<<(.*?)>>>\(arguments\)", emulated_launch, text)
    assert count == 1, "launch_kernel.cuh no longer launches kernel<<<...>>>(arguments)"
    if not header.exists() or header.read_text() != text:
        header.write_text(text)
    return header


def load_operator(name: str, text: str) -> torch._ops._OpNamespace:
    """``torch.ops.NAME`` with the operators of that text of expert_mlp_cuda.cpp."""
    operator = FOLDER / name / "ops" / OPERATOR.name
    operator.parent.mkdir(parents=True, exist_ok=True)
    operator.write_text(text)
    kernels = [write_launch_header(), *inputs_of(CSRC), *cpp_of_tests(TESTS)]
    kernel_mark, mark = hash_of(*kernels), hash_of(operator, *kernels)
    folders = [FOLDER / name, FOLDER / "include", GLUE, CSRC / "cuda/emulation/include"]
    folders += [CSRC, CSRC / "cuda", CSRC / "ops"]
    flags = [*FLAGS, "-fPIC", "-Wno-unused-function", *(f"-I{path}" for path in folders)]
    runner = [path for path in inputs_of(CSRC) if "emulation" in path.parts and path.suffix == ".cpp"]
    rewritten = [rewrite_kernel(CSRC / "cuda" / launcher, FOLDER) for launcher in LAUNCHERS]
    objects = [
        compile_to(FOLDER / f"{path.stem}.{kernel_mark}.o", [*flags, "-include", "cuda_runtime_extras.h", "-c", path])
        for path in [*rewritten, *runner]
    ]
    system = [flag for path in include_paths() for flag in ("-isystem", path)]
    glue_flags = [*flags, *system, f"-DMOETRAIN_NAMESPACE={name}", "-c"]
    glue = compile_to(FOLDER / f"{name}.{mark}.o", [*glue_flags, GLUE / "expert_mlp.cpp"])
    libraries = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    libraries += ["-Wl,-Bsymbolic", "-lc10", "-ltorch_cpu", "-ltorch"]
    library = compile_to(FOLDER / f"{name}.{mark}.so", ["-shared", glue, *objects, *libraries])
    torch.ops.load_library(str(library))
    return getattr(torch.ops, name)


@pytest.fixture(scope="module")
def emulated() -> torch._ops._OpNamespace:
    """The operators as they stand."""
    return load_operator("moetrain_emulated", OPERATOR.read_text())


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
    broken = load_operator(f"moetrain_broken_{mutant_idx}", text.replace(old, new))
    with pytest.raises(AssertionError, match=symptom):
        require_right(broken, Case(1, "swiglu", 136, 64, biases=True, slots=True))


def test_nothing_to_do(emulated: torch._ops._OpNamespace) -> None:
    case = Case(2, "swiglu", 64, 64, biases=True, slots=False)
    none = torch.zeros(0, dtype=torch.int32)
    head = (case.x_RD, none, torch.zeros(0), torch.zeros(7, dtype=torch.int32), *case.head()[4:])
    y_RD, h = emulated.expert_mlp(*head, "swiglu", True)
    assert h.shape[0] == 0
    for tensor in (y_RD, *emulated.expert_mlp_backward(case.dy_RD, *head, h, "swiglu")):
        assert not tensor.any()


def test_what_the_kernels_cannot_take_is_refused(emulated: torch._ops._OpNamespace) -> None:
    case = Case(3, "swiglu", 64, 60, biases=False, slots=False)
    with pytest.raises(ValueError, match="D and F to be multiples of 8, got 64 and 60; set MOETRAIN_CUDA_PATH=simple"):
        emulated.expert_mlp(*case.head(), "swiglu", False)


def test_every_launcher_is_built() -> None:
    assert {Path(name).stem for name in LAUNCHERS} >= {"up_gemm_sm90", "sums_sm90", "varlen_k_gemm_sm90", "group_pairs"}
