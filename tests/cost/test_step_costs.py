import dataclasses

import pytest
import torch

from moetrain.cost.step_costs import StepCosts

COSTS = StepCosts(pair_s=2.0, near_row_s=3.0, far_row_s=5.0, weight_byte_s=0.5, expert_bytes=8.0, overlap_s=10.0)


def test_a_layer_takes_what_its_worst_group_does_and_what_nothing_hides() -> None:
    assert COSTS.layer_s(pairs=1, near_rows=1, far_rows=1, replicas=2) == 2 + 3 + 5
    assert COSTS.layer_s(pairs=1, near_rows=0, far_rows=0, replicas=4) == 2 + (16 - 10)
    assert COSTS.layers_s(torch.tensor([[1.0, 1.0, 1.0, 2.0], [1.0, 0.0, 0.0, 4.0]])) == [10.0, 8.0]


def test_the_overlap_degree_is_the_replicas_that_are_hidden() -> None:
    assert COSTS.overlap_degree == 2  # 10 seconds, 4 each
    assert dataclasses.replace(COSTS, overlap_s=12.0).overlap_degree == 3
    assert dataclasses.replace(COSTS, expert_bytes=0.0).overlap_degree == 2**31 - 1


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["pair_s", "overlap_s"])
def test_what_no_measurement_gives_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"costs\.{field} must be finite and at least 0, got {value}; measure it"):
        dataclasses.replace(COSTS, **{field: value})
