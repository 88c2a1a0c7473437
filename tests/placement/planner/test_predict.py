import pytest
import torch
from torch import Tensor

from moetrain.placement.planner.predict import EmaPredictor, MeanPredictor, make_predictor, relative_error


def counts(*values: float) -> Tensor:
    """[1, 1, E]"""
    return torch.tensor([[list(values)]])


def test_the_mean_is_of_the_last_five() -> None:
    predictor = make_predictor("mean", 1, 1, 2)
    assert isinstance(predictor, MeanPredictor)
    assert predictor.predict() is None
    for step in range(7):
        predictor.observe(counts(step, 1.0))
    torch.testing.assert_close(predictor.predict(), counts(4.0, 1.0), rtol=0, atol=0)


def test_the_exponential_mean_forgets_four_fifths_a_step() -> None:
    predictor = make_predictor("ema", 1, 1, 2)
    assert isinstance(predictor, EmaPredictor)
    for count in (counts(10.0, 0.0), counts(0.0, 5.0), counts(0.0, 5.0)):
        predictor.observe(count)
    torch.testing.assert_close(predictor.predict(), counts(0.4, 4.8))


def test_a_drifting_load_is_predicted_better_by_the_newer_steps() -> None:
    random = torch.Generator().manual_seed(0)
    errors: dict[str, list[float]] = {"mean": [], "ema": []}
    predictors = {rule: make_predictor(rule, 2, 2, 32) for rule in errors}
    log_load = torch.randn(2, 1, 32, generator=random)
    for _ in range(30):
        log_load = log_load + 0.1 * torch.randn(2, 1, 32, generator=random)
        count_LNE = (100 * log_load.exp()).expand(-1, 2, -1)
        for rule, predictor in predictors.items():
            predictor.observe(count_LNE)
            errors[rule] += [] if predictor.error is None else [predictor.error]
    assert sum(errors["ema"]) < 0.85 * sum(errors["mean"])


@pytest.mark.parametrize("rule", ["mean", "ema"])
def test_errors_are_of_the_step_that_had_been_predicted(rule: str) -> None:
    predictor = make_predictor(rule, 1, 1, 2)
    predictor.observe(counts(10.0, 10.0))
    first_error = predictor.error
    assert first_error is None
    predictor.observe(counts(15.0, 5.0))
    assert predictor.error == 0.5  # 5 + 5 of 20
    assert relative_error(counts(0.0), counts(0.0)) == 0
    assert relative_error(counts(1.0), counts(0.0)) == 2


@pytest.mark.parametrize("rule", ["mean", "ema"])
def test_a_resumed_predictor_goes_on_with_the_same_bits(rule: str) -> None:
    random = torch.Generator().manual_seed(1)
    steps = [torch.rand(2, 3, 4, generator=random) for _ in range(9)]
    whole, first, second = (make_predictor(rule, 2, 3, 4) for _ in range(3))
    for count_LNE in steps[:7]:
        whole.observe(count_LNE)
        first.observe(count_LNE)
    assert second.load_state_dict(first.state_dict()) is True
    first.observe(steps[0])  # the state is a copy
    assert second.error == whole.error
    for count_LNE in steps[7:]:
        whole.observe(count_LNE)
        second.observe(count_LNE)
    torch.testing.assert_close(second.predict(), whole.predict(), rtol=0, atol=0)
    assert second.error == whole.error
    with pytest.raises(AssertionError):
        torch.testing.assert_close(first.predict(), whole.predict(), rtol=0, atol=0)


def test_another_number_of_nodes_starts_from_totals() -> None:
    saved = make_predictor("mean", 1, 2, 2)
    saved.observe(torch.tensor([[[8.0, 0.0], [0.0, 4.0]]]))
    resumed = make_predictor("mean", 1, 4, 2)
    assert resumed.load_state_dict(saved.state_dict()) is False
    found = resumed.predict()
    assert found is not None
    assert found.tolist() == [[[2.0, 1.0]] * 4]


def test_counts_of_another_shape_or_no_counts_are_refused() -> None:
    predictor = make_predictor("ema", 1, 2, 3)
    with pytest.raises(ValueError, match=r"counts must be .* = \[1, 2, 3\], got \[1, 2, 4\]"):
        predictor.observe(torch.zeros(1, 2, 4))
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"counts must be finite and at least 0, got values from"):
            predictor.observe(torch.full((1, 2, 3), value))
    assert predictor.predict() is None
    other = make_predictor("ema", 1, 2, 4)
    other.observe(torch.ones(1, 2, 4))
    with pytest.raises(ValueError, match=r"of 1 layers and 3 experts, got .* = \[1, 2, 4\]; resume with the model"):
        predictor.load_state_dict(other.state_dict())


def test_an_unknown_rule_is_refused_with_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"placement\.predictor must be one of 'mean', 'ema', got 'meen'; did you mean 'm"
    ):
        make_predictor("meen", 1, 1, 1)
