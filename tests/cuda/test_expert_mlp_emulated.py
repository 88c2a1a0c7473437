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
    for folder in ("grouped_gemm_sm90", "expert_mlp_sm90")
    for path in (CSRC / "cuda" / folder).glob("*.cu")
)


@pytest.fixture(scope="module")
def emulated() -> torch._ops._OpNamespace:
    """``torch.ops.moetrain_emulated``."""
    folder = BUILD / "operator"
    header = folder / "include" / "cuda" / "grouped_gemm_sm90" / "launch_kernel.cuh"
    header.parent.mkdir(parents=True, exist_ok=True)
    text = (CSRC / "cuda" / "grouped_gemm_sm90" / "launch_kernel.cuh").read_text()
    text, count = re.subn(
        r"kernel<<<(.*?)>>>\(arguments\)", r"moetrain::emulation::launch(\1)(kernel, arguments)", text
    )
    assert count == 1, "launch_kernel.cuh no longer launches kernel<<<...>>>(arguments)"
    header.write_text(text)
    operator = CSRC / "ops" / "expert_mlp_cuda.cpp"
    kernels = [header, *inputs_of(CSRC), *cpp_of_tests(TESTS)]
    kernel_mark, mark = hash_of(*kernels), hash_of(operator, *kernels)
    includes = [
        f"-I{path}" for path in (folder / "include", GLUE, CSRC / "cuda/emulation/include", CSRC, CSRC / "cuda")
    ]
    flags = [*FLAGS, "-fPIC", "-Wno-unused-function", *includes]
    runner = [path for path in inputs_of(CSRC) if "emulation" in path.parts and path.suffix == ".cpp"]
    rewritten = [rewrite_kernel(CSRC / "cuda" / name, folder) for name in LAUNCHERS]
    objects = [
        compile_to(folder / f"{path.stem}.{kernel_mark}.o", [*flags, "-include", "cuda_runtime_extras.h", "-c", path])
        for path in [*rewritten, *runner]
    ]
    system = [flag for path in include_paths() for flag in ("-isystem", path)]
    glue = compile_to(folder / f"glue.{mark}.o", [*flags, *system, "-c", GLUE / "expert_mlp.cpp"])
    libraries = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    library = compile_to(
        folder / f"operator.{mark}.so", ["-shared", glue, *objects, *libraries, "-lc10", "-ltorch_cpu", "-ltorch"]
    )
    torch.ops.load_library(str(library))
    return torch.ops.moetrain_emulated


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
    case = Case(1, activation, width, hidden, biases=biases, slots=slots)
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
    with pytest.raises(
        ValueError, match="D and F to be multiples of 8, got 64 and 60; set MOETRAIN_CUDA_PATH=composed"
    ):
        emulated.expert_mlp(*case.head(), "swiglu", False)


def test_every_launcher_is_built() -> None:
    assert {Path(name).stem for name in LAUNCHERS} >= {"up_gemm_sm90", "sums_sm90", "varlen_k_gemm_sm90", "group_pairs"}
