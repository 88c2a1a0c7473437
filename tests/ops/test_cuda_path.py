"""The choice between the ways in which expert_mlp runs on CUDA. No test here needs a GPU."""

import re
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from moetrain.ops.cuda_path import CUDA_PATHS, best_path, choose_cuda_path, obstacle_to, wanted_cuda_path
from moetrain.ops.expert_inputs import ExpertInputs

AMPERE, HOPPER, BLACKWELL, CONSUMER = (8, 0), (9, 0), (10, 0), (12, 0)


def bf16(*sizes: int) -> Tensor:
    return torch.zeros(sizes, dtype=torch.bfloat16)


def int32(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int32)


def make(width: int = 16, hidden: int = 24, slots: int = 3) -> ExpertInputs:
    weights = bf16(slots, 2, hidden, width), bf16(slots, width, hidden)
    lists = int32(9), torch.zeros(9), int32(slots + 1)
    return ExpertInputs(bf16(5, width), *lists, *weights, None, bf16(slots, 2, hidden), bf16(slots, width))


FITS = make()
FLOAT = FITS._replace(x_RD=torch.zeros(5, 16))
SHIFTED = FITS._replace(w_in=bf16(3 * 2 * 24 * 16 + 1)[1:].view(3, 2, 24, 16))
ONE_W_IN, ONE_W_OUT = bf16(1, 2, 24, 16).expand(3, 2, 24, 16), bf16(1, 16, 24).expand(3, 16, 24)
APART = FITS._replace(w_in=bf16(3, 2, 32, 16)[:, :, :24])


@pytest.mark.parametrize("capability", [AMPERE, (8, 6), (8, 9), HOPPER, BLACKWELL, CONSUMER])
def test_nothing_stands_in_the_way_of_the_newest_kernels(capability: tuple[int, int]) -> None:
    best = "sm90" if capability == HOPPER else "sm80"
    slots_with_gaps = FITS._replace(w_in=bf16(6, 2, 24, 16)[::2])
    for inputs in (FITS, FITS._replace(b_in=None, b_out=None), slots_with_gaps):
        assert best_path(capability, inputs) == (best, None)


@pytest.mark.parametrize(
    ("path", "capability", "inputs", "obstacle"),
    [
        ("sm90", AMPERE, FITS, "compute capability 9.0, this device has 8.0"),
        ("sm90", BLACKWELL, FITS, "compute capability 9.0, this device has 10.0"),
        ("sm80", (7, 5), FITS, "compute capability 8.0 or later, this device has 7.5"),
        ("grouped_mm", AMPERE, FITS, "compute capability 9.x or 10.x, this device has 8.0"),
        ("grouped_mm", CONSUMER, FITS, "compute capability 9.x or 10.x, this device has 12.0"),
        ("sm90", HOPPER, FLOAT, "bfloat16, got float32"),
        ("sm80", HOPPER, FLOAT, "bfloat16, got float32"),
        ("grouped_mm", HOPPER, FLOAT, "bfloat16, got float32"),
        ("sm90", HOPPER, make(width=12), "D and F to be multiples of 8, got 12 and 24"),
        ("grouped_mm", HOPPER, make(hidden=20), "D and F to be multiples of 8, got 16 and 20"),
        ("grouped_mm", HOPPER, FITS._replace(offset_E1=int32(1025)), "at most 1023 experts, got 1024"),
        ("sm90", HOPPER, SHIFTED, "w_in at multiples of 16 bytes, got strides (768, 384, 16, 1)"),
        ("sm80", HOPPER, FITS._replace(w_out=bf16(3, 16, 28)[..., :24]), "w_out at multiples of 16 bytes"),
        ("sm90", HOPPER, FITS._replace(b_out=bf16(3, 20)[:, :16]), "b_out at multiples of 16 bytes"),
        ("sm90", HOPPER, APART, "gate and up of w_in to adjoin, got strides (1024, 512, 16, 1)"),
        ("sm90", HOPPER, FITS._replace(b_in=bf16(3, 2, 32)[..., :24]), "gate and up of b_in to adjoin"),
        ("sm90", HOPPER, FITS._replace(w_in=ONE_W_IN), "its own for each slot of w_in, got strides (0, 384, 16, 1)"),
        ("sm80", AMPERE, FITS._replace(w_out=ONE_W_OUT), "its own for each slot of w_out, got strides (0, 24, 1)"),
        ("sm80", HOPPER, make(8, 8, 12001)._replace(slot_E=int32(3)), "at most 12000 slots, got 12001"),
        (
            "sm90",
            HOPPER,
            FITS._replace(w_in=bf16(1).expand(2**18, 2, 2**12, 16), w_out=bf16(1).expand(2**18, 16, 2**12), b_in=None),
            "slots times rows of a slot to be at most 2147483647, got 2147483648",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_stands_in_the_way(path: str, capability: tuple[int, int], inputs: ExpertInputs, obstacle: str) -> None:
    assert obstacle in (obstacle_to(path, capability, inputs) or "nothing")  # type: ignore[arg-type]
    assert obstacle_to("simple", capability, inputs) is None
    assert obstacle_to("loop", capability, inputs) is None


@pytest.mark.parametrize(
    ("capability", "inputs", "path", "reason"),
    [
        (HOPPER, SHIFTED, "grouped_mm", "w_in at multiples of 16 bytes"),
        (HOPPER, APART, "grouped_mm", "gate and up of w_in to adjoin"),
        (HOPPER, FITS._replace(w_in=ONE_W_IN), "grouped_mm", "a matrix of its own for each slot of w_in"),
        (AMPERE, FITS._replace(w_out=ONE_W_OUT), "simple", "a matrix of its own for each slot of w_out"),
        (BLACKWELL, APART, "grouped_mm", "gate and up of w_in to adjoin"),
        (AMPERE, APART, "simple", "gate and up of w_in to adjoin"),
        (CONSUMER, APART, "simple", "gate and up of w_in to adjoin"),
        (HOPPER, FLOAT, "simple", "bfloat16, got float32"),
        (HOPPER, make(width=12), "simple", "multiples of 8"),
        (HOPPER, APART._replace(offset_E1=int32(1025)), "simple", "gate and up of w_in to adjoin"),
    ],
)
def test_what_runs_where_no_kernel_fits(
    capability: tuple[int, int], inputs: ExpertInputs, path: str, reason: str
) -> None:
    chosen, obstacle = best_path(capability, inputs)
    assert chosen == path
    assert reason in (obstacle or "nothing")


def test_inputs_of_no_shape_are_left_to_the_operator() -> None:
    of_no_shape = {"x_RD": bf16(), "w_in": bf16(7), "w_out": bf16(7), "b_in": bf16(7), "b_out": bf16()}
    for name, tensor in of_no_shape.items():
        assert best_path(HOPPER, FITS._replace(**{name: tensor})) == ("sm90", None)
    assert best_path(HOPPER, FITS._replace(b_in=bf16(3, 24))) == ("sm90", None)


def test_all_slots_may_have_one_bias_and_one_slot_any_stride() -> None:
    biases = {"b_in": bf16(1, 2, 24).expand(3, 2, 24), "b_out": bf16(1, 16).expand(3, 16)}
    one = make(slots=1)
    unstrided = one.w_in.as_strided(one.w_in.shape, (0, *one.w_in.stride()[1:]))
    for inputs in (FITS._replace(**biases), one._replace(w_in=unstrided)):
        assert best_path(HOPPER, inputs) == ("sm90", None)


def test_the_address_counts_not_the_place_in_the_storage() -> None:
    """A storage may begin anywhere, as one over foreign memory does."""
    sizes, items = FITS.w_out.shape, FITS.w_out.numel()
    memory = np.zeros(2 * items + 48, dtype=np.uint8)
    begin = -memory.ctypes.data % 16 + 2
    past_a_multiple = torch.from_numpy(memory[begin : begin + 2 * items + 16]).view(torch.bfloat16)
    shifted = FITS._replace(w_out=past_a_multiple[:items].view(sizes))
    assert "w_out at multiples of 16 bytes" in (obstacle_to("sm90", HOPPER, shifted) or "nothing")
    aligned = FITS._replace(w_out=past_a_multiple[7 : items + 7].view(sizes))
    assert obstacle_to("sm90", HOPPER, aligned) is None


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], None]:
    """Pretends that the tensors' device has a compute capability."""
    monkeypatch.delenv("MOETRAIN_CUDA_PATH", raising=False)

    def pretend(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)

    return pretend


def test_kernels_of_its_own_run_without_a_word(on_device: Callable[[tuple[int, int]], None]) -> None:
    on_device(HOPPER)
    assert choose_cuda_path(FITS) == "sm90"
    on_device(AMPERE)
    assert choose_cuda_path(FITS) == "sm80"


@pytest.mark.parametrize("path", CUDA_PATHS)
def test_a_path_is_forced(
    path: str, on_device: Callable[[tuple[int, int]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_device(HOPPER)
    monkeypatch.setenv("MOETRAIN_CUDA_PATH", path)
    assert choose_cuda_path(FITS) == path


@pytest.mark.parametrize(
    ("path", "inputs", "text"),
    [
        ("sm90", FITS, "is sm90, which for expert_mlp needs compute capability 9.0, this device has 8.0; unset it"),
        ("sm80", FLOAT, "is sm80, which for expert_mlp needs bfloat16, got float32; unset it to let moetrain choose"),
        ("grouped_mm", FITS, "is grouped_mm, which for expert_mlp needs compute capability 9.x or 10.x"),
    ],
)
def test_a_forced_path_that_cannot_run_says_what_is_missing(
    path: str,
    inputs: ExpertInputs,
    text: str,
    on_device: Callable[[tuple[int, int]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    on_device(AMPERE)
    monkeypatch.setenv("MOETRAIN_CUDA_PATH", path)
    with pytest.raises(ValueError, match=re.escape(text)):
        choose_cuda_path(inputs)


def test_the_warning_comes_once_and_can_be_silenced(
    on_device: Callable[[tuple[int, int]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_device(AMPERE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        assert [
            choose_cuda_path(FLOAT),
            choose_cuda_path(FLOAT),
            choose_cuda_path(make(width=12)),
            choose_cuda_path(FLOAT),
        ] == ["simple"] * 4
    texts = [str(warning.message) for warning in caught]
    assert texts == [
        "expert_mlp runs from separate products (simple), slower and with more memory, since its own kernels need "
        f"{reason}; MOETRAIN_CUDA_PATH=simple silences this"
        for reason in ("bfloat16, got float32", "D and F to be multiples of 8, got 12 and 24")
    ]
    monkeypatch.setenv("MOETRAIN_CUDA_PATH", "simple")
    assert choose_cuda_path(FLOAT) == "simple"


def test_an_unknown_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOETRAIN_CUDA_PATH", "composed")
    with pytest.raises(
        ValueError, match="MOETRAIN_CUDA_PATH must be sm90, sm80, grouped_mm, simple or loop, got composed; unset it"
    ):
        wanted_cuda_path()
