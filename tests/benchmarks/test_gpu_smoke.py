"""What gpu_smoke.py says of right, wrong, hanging and dying cases. No GPU is needed."""

import gpu_smoke
import pytest
import torch
from gpu_smoke import CASES, Inputs, differ, run_apart, run_here

from moetrain.ops.cuda_path import CUDA_PATHS, VARIABLE


@pytest.mark.parametrize("name", [name for name, (_, path) in CASES.items() if path in (None, "simple")])
def test_every_case_runs_and_answers_repeat(name: str) -> None:
    assert run_here(name, "cpu") == (0, "ok")


def test_every_path_of_expert_mlp_has_a_case() -> None:
    assert [name for name in CASES if name.startswith("expert_mlp ")] == [f"expert_mlp {path}" for path in CUDA_PATHS]


def test_a_wrong_number_is_wrong() -> None:
    wanted = [torch.tensor([1.0, -2.0]), torch.tensor([3, 4])]
    assert differ([torch.tensor([1.0, -2.0]), torch.tensor([3, 4])], wanted) is None
    assert differ([torch.tensor([1.0, -2.001]), torch.tensor([3, 4])], wanted) == (
        "answer 0: the largest error is 0.001, at most 2.19e-05 was expected"
    )
    assert differ([torch.tensor([1.0, torch.nan]), torch.tensor([3, 4])], wanted) is not None
    assert differ([wanted[0], torch.tensor([3, 5])], wanted) == "answer 1: 1 of 2 integers are wrong"


def test_a_path_that_the_device_does_not_have_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(given: Inputs) -> list[torch.Tensor]:
        if given.device == "cpu":
            return []
        raise ValueError(f"{VARIABLE} is sm90, but this device has 8.0")

    monkeypatch.setitem(gpu_smoke.CASES, "refuse", (refuse, "sm90"))
    monkeypatch.setattr(
        gpu_smoke, "Inputs", type("Given", (), {"__init__": lambda self, d: setattr(self, "device", d)})
    )
    monkeypatch.delenv(VARIABLE, raising=False)
    assert run_here("refuse", "cuda") == (gpu_smoke.NOT_HERE, f"not here: {VARIABLE} is sm90, but this device has 8.0")
    monkeypatch.delenv(VARIABLE)


def test_a_case_apart_tells_its_end() -> None:
    assert run_apart("group_pairs", "cpu", 250) == (0, "ok")
    assert run_apart("group_pairs", "cpu", 0.05) == (1, "HUNG, or took longer than 0.05 s")
    code, text = run_apart("group_pairs", "no-such-device", 250)
    assert code == 1
    assert "no-such-device" in text
