"""The choice between expert_mlp's kernels for Hopper and the composition of other operators."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moetrain.ops.cuda_path import choose_cuda_path, obstacle_to_sm90, wanted_cuda_path

HOPPER = (9, 0)


def bf16(*sizes: int) -> Tensor:
    return torch.zeros(sizes, dtype=torch.bfloat16)


def weights(width: int = 16, hidden: int = 24, slots: int = 3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return bf16(slots, 2, hidden, width), bf16(slots, width, hidden), bf16(slots, 2, hidden), bf16(slots, width)


def test_nothing_stands_in_the_way() -> None:
    assert obstacle_to_sm90(HOPPER, bf16(5, 16), *weights()) is None
    assert obstacle_to_sm90(HOPPER, bf16(5, 16), *weights()[:2], None, None) is None
    apart = bf16(6, 2, 24, 16)[::2]  # slots with gaps
    assert obstacle_to_sm90(HOPPER, bf16(5, 16), apart, *weights()[1:]) is None


@pytest.mark.parametrize(
    ("capability", "x", "tensors", "obstacle"),
    [
        ((8, 0), bf16(5, 16), weights(), "compute capability 9.0, this device has 8.0"),
        ((10, 0), bf16(5, 16), weights(), "compute capability 9.0, this device has 10.0"),
        (HOPPER, torch.zeros(5, 16), weights(), "bfloat16, got float32"),
        (HOPPER, bf16(5, 12), weights(width=12), "D and F to be multiples of 8, got 12 and 24"),
        (HOPPER, bf16(5, 16), weights(hidden=20), "D and F to be multiples of 8, got 16 and 20"),
        (HOPPER, bf16(5, 16), (bf16(3 * 2 * 24 * 16 + 1)[1:].view(3, 2, 24, 16), *weights()[1:]), "w_in at multiples"),
        (HOPPER, bf16(5, 16), (weights()[0], bf16(3, 16, 28)[..., :24], None, None), "w_out at multiples of 16 bytes"),
        (HOPPER, bf16(5, 16), (*weights()[:3], bf16(3, 20)[:, :16]), "b_out at multiples of 16 bytes"),
        (HOPPER, bf16(5, 16), (bf16(3, 2, 32, 16)[:, :, :24], *weights()[1:]), "gate and up of w_in to adjoin"),
        (HOPPER, bf16(5, 16), (*weights()[:2], bf16(3, 2, 32)[..., :24], None), "gate and up of b_in to adjoin"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_stands_in_the_way(
    capability: tuple[int, int], x: Tensor, tensors: tuple[Tensor | None, ...], obstacle: str
) -> None:
    w_in, w_out, *biases = tensors
    assert w_in is not None
    assert w_out is not None
    assert obstacle in (obstacle_to_sm90(capability, x, w_in, w_out, *biases) or "nothing")


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], None]:
    """Pretends that the tensors' device has a compute capability."""

    def pretend(capability: tuple[int, int]) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: capability)

    return pretend


def test_hopper_gets_its_kernels(on_device: Callable[[tuple[int, int]], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOETRAIN_CUDA_PATH", raising=False)
    on_device(HOPPER)
    assert choose_cuda_path(bf16(5, 16), *weights()) == "sm90"
    monkeypatch.setenv("MOETRAIN_CUDA_PATH", "sm90")
    assert choose_cuda_path(bf16(5, 16), *weights()) == "sm90"
    monkeypatch.setenv("MOETRAIN_CUDA_PATH", "composed")
    assert choose_cuda_path(bf16(5, 16), *weights()) == "composed"


def test_others_get_the_composition_and_a_warning(
    on_device: Callable[[tuple[int, int]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MOETRAIN_CUDA_PATH", raising=False)
    on_device((8, 0))
    expected = (
        "expert_mlp runs as separate operators.*need compute capability 9.0.*MOETRAIN_CUDA_PATH=composed silences"
    )
    with pytest.warns(UserWarning, match=expected):
        assert choose_cuda_path(bf16(5, 16), *weights()) == "composed"
    monkeypatch.setenv("MOETRAIN_CUDA_PATH", "composed")
    assert choose_cuda_path(bf16(5, 16), *weights()) == "composed"
    monkeypatch.setenv("MOETRAIN_CUDA_PATH", "sm90")
    expected = "MOETRAIN_CUDA_PATH is sm90, but expert_mlp's kernels for it need compute capability 9.0"
    with pytest.raises(ValueError, match=re.escape(expected)):
        choose_cuda_path(bf16(5, 16), *weights())


def test_an_unknown_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOETRAIN_CUDA_PATH", "sm_90")
    with pytest.raises(ValueError, match="MOETRAIN_CUDA_PATH must be sm90 or composed, got sm_90; unset it"):
        wanted_cuda_path()
