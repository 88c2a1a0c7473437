"""What offer_pairs and round_pairs do not take, and what they say."""

from typing import Any

import pytest
import torch

from moetrain.ops import offer_pairs, round_pairs


def arguments(**changes: Any) -> dict[str, Any]:
    gid_T2 = torch.zeros(4, 2, dtype=torch.int64)
    pairs = {
        "score_TE": torch.rand(4, 3),
        "token_N": torch.tensor([0, 1, 3], dtype=torch.int32),
        "offset_E1": torch.tensor([0, 2, 3, 3], dtype=torch.int32),
    }
    return {**pairs, "token_gid_T2": gid_T2, "tile": 2, "valid_T": None, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"tile": 0}, ValueError, r"offer_pairs: tile must be between 1 and 65536, got 0"),
        ({"score_TE": torch.zeros(4)}, ValueError, r"score must be \[T, E\] with E >= 1, got \[4\]"),
        ({"score_TE": torch.zeros(4, 3).bfloat16()}, TypeError, r"since narrower scores tie by rounding, got BFloat16"),
        ({"score_TE": torch.zeros(3, 4).T}, ValueError, r"the last dimension of score must have stride 1"),
        ({"token_N": torch.zeros(3)}, TypeError, r"offer_pairs: token must be Int, got Float"),
        ({"offset_E1": torch.zeros(3).int()}, ValueError, r"offset must be \[E \+ 1\] = \[4\], got \[3\]"),
        ({"token_N": torch.tensor([1, 1, 3]).int()}, ValueError, r"must ascend strictly .* but expert 0 breaks that"),
        ({"token_N": torch.tensor([0, 1, 4]).int()}, ValueError, r"within \[0, 4\) .* but expert 1 breaks that"),
        ({"offset_E1": torch.tensor([0, 2, 1, 3]).int()}, ValueError, r"but expert 1 breaks that"),
        ({"offset_E1": torch.tensor([0, 2, 3, 4]).int()}, ValueError, r"offsets within \[0, 3\], but expert 2"),
        ({"token_gid_T2": torch.zeros(4, 2)}, TypeError, r"token_gid must be Long, got Float"),
        ({"valid_T": torch.ones(3, dtype=torch.bool)}, ValueError, r"valid must be \[T\] = \[4\], got \[3\]"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_offers_refuse_what_they_cannot_use(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        offer_pairs(**arguments(**changes))


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"rule": "nearby"}, ValueError, r"round_pairs: rule must be 'nearest', .* or 'down', got 'nearby'"),
        ({"tile": 3}, ValueError, r"offers must be \[W, E, 4 \+ 6 tile\] = \[1, 3, 22\], got \[1, 3, 16\]"),
        ({"rank": 1}, ValueError, r"rank must be between 0 and W - 1 = 0, got 1"),
        ({"holder_WE": torch.zeros(2, 3).int()}, ValueError, r"holder must be \[W, E\] = \[1, 3\], got \[2, 3\]"),
    ],
)
def test_rounding_refuses_what_it_cannot_use(changes: dict[str, Any], error: type[Exception], text: str) -> None:
    given = arguments()
    offers = offer_pairs(**given)
    pairs = {name: given[name] for name in ("score_TE", "token_N", "offset_E1")}
    with pytest.raises(error, match=text):
        round_pairs(**pairs, offers=offers, **{"tile": 2, **changes})
