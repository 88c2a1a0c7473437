import pytest
import torch
from moe.helpers import make_moe
from torch import Tensor

from moetrain.moe import BalanceState, max_vio


def _alone(x: Tensor) -> Tensor:
    return x.clone()


def _counts(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def test_shares_are_equal_before_anything_was_counted() -> None:
    state = BalanceState([2, 5], make_moe(num_experts=3))
    torch.testing.assert_close(state[5].share(), torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0, atol=0)
    state.finish_step(_alone)
    torch.testing.assert_close(state[5].share(), torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0, atol=0)


def test_shares_lag_by_one_step_and_do_not_depend_on_how_the_step_was_split() -> None:
    whole, split = (BalanceState([2, 5], make_moe(num_experts=3)) for _ in range(2))
    whole[5].add(_counts(6, 0, 2))
    for part in (_counts(1, 0, 2), _counts(0, 0, 0), _counts(5, 0, 0)):
        split[5].add(part)
        torch.testing.assert_close(split[5].share(), torch.full((3,), 1 / 3, dtype=torch.float64), rtol=0, atol=0)
    for state in (whole, split):
        state.finish_step(_alone)
        assert state[5].share().tolist() == [0.75, 0.0, 0.25]
        assert state[2].share().tolist() == [1 / 3] * 3
    whole.finish_step(_alone)
    assert whole[5].share().tolist() == [1 / 3] * 3, "counts of a step must not stay for the next"


def test_counts_are_summed_over_ranks() -> None:
    state = BalanceState([0], make_moe(num_experts=3))
    state[0].add(_counts(1, 2, 1))
    report = state.finish_step(lambda x: x + torch.tensor([[3, 2, 3, 0, 7, 8]]))
    assert report.count_LE.tolist() == [[4, 4, 4]]
    assert report.max_vio == (0.0,)
    assert report.layers == (0,)
    assert (report.rows_added, report.rows_dropped) == ((7,), (8,))


def test_rounded_rows_are_counted_by_layer_until_the_step_ends() -> None:
    state = BalanceState([2, 5], make_moe(num_experts=3))
    state[5].add_changes(_counts(1, 0, 2), _counts(0, 4, 0))
    state[5].add_changes(_counts(0, 1, 0), _counts(2, 0, 0))
    report = state.finish_step(_alone)
    assert (report.rows_added, report.rows_dropped) == ((0, 4), (0, 6))
    assert report.count_LE.sum() == 0
    assert state.finish_step(_alone).rows_added == (0, 0)


def test_max_vio_is_the_largest_load_over_the_mean_minus_one() -> None:
    assert max_vio(_counts(6, 0, 2, 0)) == 2.0
    assert max_vio(_counts(2, 2, 2)) == 0.0
    assert max_vio(_counts(0, 0)) == 0.0


def test_sign_rule_moves_every_bias_by_the_rate_towards_balance() -> None:
    state = BalanceState([0], make_moe(num_experts=4, loss_free=True, bias_rate=0.5))
    state[0].add(_counts(9, 1, 4, 2))
    state.finish_step(_alone)
    bias_E = state[0].selection_bias()
    assert bias_E is not None
    assert bias_E.tolist() == [-0.5, 0.5, 0.0, 0.5]
    state[0].add(_counts(0, 1, 1, 0))
    state.finish_step(_alone)
    assert bias_E.tolist() == [0.0, 0.0, -0.5, 1.0]


def test_a_skipped_step_moves_no_bias_and_leaves_the_lagged_counts() -> None:
    state = BalanceState([0], make_moe(num_experts=4, loss_free=True, bias_rate=0.5))
    state[0].add(_counts(9, 1, 4, 2))
    state.finish_step(_alone)
    before = state.state_dict()
    state[0].add(_counts(0, 6, 0, 0))
    report = state.finish_step(_alone, skipped=True)
    assert report.count_LE.tolist() == [[0, 6, 0, 0]], "what was counted is said all the same"
    assert report.max_vio == (3.0,)
    for name, value in state.state_dict()[0].items():
        assert torch.equal(value, before[0][name]), name
    state[0].add(_counts(0, 1, 1, 0))
    assert state.finish_step(_alone).count_LE.tolist() == [[0, 1, 1, 0]]
    assert state[0].selection_bias().tolist() == [0.0, 0.0, -0.5, 1.0], "as if it had not been"  # type: ignore[union-attr]


def test_a_mean_that_is_no_whole_number_leaves_no_expert_balanced() -> None:
    state = BalanceState([0], make_moe(num_experts=3, loss_free=True, bias_rate=1.0))
    state[0].add(_counts(1, 1, 2))
    state.finish_step(_alone)
    assert state[0].selection_bias().tolist() == [1.0, 1.0, -1.0]  # type: ignore[union-attr]


def test_no_bias_unless_balancing_is_loss_free() -> None:
    state = BalanceState([0], make_moe(num_experts=3))
    state[0].add(_counts(3, 0, 0))
    state.finish_step(_alone)
    assert state[0].selection_bias() is None
    assert not state.state_dict()[0]["bias_E"].any()


def test_non_finite_logits_noted_on_the_device_raise_at_the_end_of_the_step() -> None:
    state = BalanceState([4, 7], make_moe(num_experts=3))
    state[7].add_bad(torch.tensor([2], dtype=torch.int32))
    with pytest.raises(FloatingPointError, match=r"MoE layers \[7\]: router logits held NaN or Inf"):
        state.finish_step(_alone)


def test_state_survives_saving_and_loading() -> None:
    config = make_moe(num_experts=3, loss_free=True)
    state, fresh = BalanceState([1], config), BalanceState([1], config)
    state[1].add(_counts(2, 1, 1))
    state.finish_step(_alone)
    fresh[1].add(_counts(9, 9, 9))
    fresh.load_state_dict(state.state_dict())
    assert fresh[1].share().tolist() == [0.5, 0.25, 0.25]
    torch.testing.assert_close(fresh[1].selection_bias(), state[1].selection_bias(), rtol=0, atol=0)
    assert fresh.finish_step(_alone).count_LE.tolist() == [[0, 0, 0]]


def test_state_is_kept_by_layer() -> None:
    """A rank that has some layers alone can take its share of what a rank with all of them has saved."""
    config = make_moe(num_experts=3, loss_free=True)
    both, second = BalanceState([1, 4], config), BalanceState([4], config)
    both[1].add(_counts(0, 0, 9))
    both[4].add(_counts(2, 1, 1))
    both.finish_step(_alone)
    second.load_state_dict(both.state_dict())
    assert second[4].share().tolist() == [0.5, 0.25, 0.25]
    assert second.state_dict().keys() == {4}


def test_a_rank_without_layers_finishes_its_step() -> None:
    report = BalanceState([], make_moe(num_experts=3)).finish_step(_alone)
    assert (report.layers, report.max_vio, report.count_LE.shape) == ((), (), (0, 3))


ZEROS_3, ZEROS_4 = torch.zeros(3), torch.zeros(4)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({}, r"lagged_count_E of layer 1 must be \[3\] \(experts\), got nothing"),
        ({2: {"lagged_count_E": ZEROS_3, "bias_E": ZEROS_3}}, r"lagged_count_E of layer 1 .* got nothing"),
        ({1: {"lagged_count_E": ZEROS_4, "bias_E": ZEROS_3}}, r"lagged_count_E of layer 1 .* got \[4\]"),
        ({1: {"lagged_count_E": ZEROS_3, "bias_E": ZEROS_4}}, r"bias_E of layer 1 must be .* got \[4\]"),
    ],
)
def test_another_models_state_is_refused(state: dict[int, dict[str, Tensor]], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        BalanceState([1], make_moe(num_experts=3)).load_state_dict(state)
