from typing import Any

import pytest
import torch

from moetrain.sequence import PackedBatch


def two_rows() -> dict[str, Any]:
    return {
        "token_id_BS": torch.tensor([[5, 6, 258, 7], [8, 258, 256, 256]]),
        "target_BS": torch.tensor([[6, 258, -1, 8], [258, -1, -1, -1]]),
        "position_BS": torch.tensor([[0, 1, 2, 0], [0, 1, 0, 0]]),
        "document_BS": torch.tensor([[0, 0, 0, 1], [0, 0, -1, -1]]),
        "sequence_id_B": torch.tensor([40, 41]),
    }


def test_counts_are_taken_when_left_out() -> None:
    batch = PackedBatch(**two_rows())
    assert (batch.num_rows, batch.seq_len, batch.num_tokens, batch.num_loss_tokens) == (2, 4, 6, 4)
    assert batch.valid().tolist() == [[True] * 4, [True, True, False, False]]


def test_moving_keeps_values_and_counts(device: str) -> None:
    batch = PackedBatch(**two_rows(), num_tokens=6, num_loss_tokens=4)
    moved = batch.to(device)
    assert moved.token_id_BS.device.type == device
    for name, value in two_rows().items():
        assert torch.equal(getattr(moved, name).cpu(), value)
    assert (moved.num_tokens, moved.num_loss_tokens) == (6, 4)


def test_moving_does_not_count_again() -> None:
    meta = PackedBatch(**two_rows()).to("meta")  # counting on meta would raise
    assert (meta.num_tokens, meta.num_loss_tokens) == (6, 4)


def test_empty_lane() -> None:
    batch = PackedBatch.empty(16)
    assert batch.token_id_BS.shape == (0, 16)
    assert (batch.num_rows, batch.seq_len, batch.num_tokens, batch.num_loss_tokens) == (0, 16, 0, 0)
    assert batch.sequence_id_B.dtype == torch.int64


@pytest.mark.parametrize("name", ["token_id_BS", "target_BS", "position_BS", "document_BS", "sequence_id_B"])
def test_wrong_dtype_or_shape_is_refused(name: str) -> None:
    rows = two_rows()
    with pytest.raises(ValueError, match=r"PackedBatch\..* must be int64"):
        PackedBatch(**{**rows, name: rows[name].int()})
    with pytest.raises(ValueError, match=r"PackedBatch\..* must be int64"):
        PackedBatch(**{**rows, name: rows[name][:1]})
