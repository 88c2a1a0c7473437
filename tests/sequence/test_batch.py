"""What one rank computes in one round."""

from typing import Any

import pytest
import torch

from moetrain.sequence import GangShare, PackedBatch, Piece
from moetrain.sequence.batch import LEAST_ROW


def three_documents() -> dict[str, Any]:
    """Two documents of row 40, one of row 41."""
    return {
        "token_id_T": torch.tensor([5, 6, 258, 7, 8, 258]),
        "target_T": torch.tensor([6, 258, -1, 8, 258, -1]),
        "pieces": (Piece(40, 0, 3, 0), Piece(40, 3, 4, 3), Piece(41, 7, 9, 7)),
    }


def test_positions_and_ids_follow_from_pieces() -> None:
    batch = PackedBatch(**three_documents())
    assert (batch.num_tokens, batch.num_loss_tokens) == (6, 4)
    assert batch.positions().tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.token_gids().tolist() == [[40, 0], [40, 1], [40, 2], [40, 3], [41, 7], [41, 8]]
    assert batch.offsets().tolist() == [0, 3, 4, 6]
    assert batch.offsets().dtype == batch.rows().dtype == torch.int32


def test_short_documents_share_a_row_and_sequences_are_not_cut() -> None:
    def rows(*pieces: Piece) -> list[int]:
        size = sum(piece.stop - piece.start for piece in pieces)
        return PackedBatch(torch.zeros(size).long(), torch.zeros(size).long(), pieces).rows().tolist()

    def documents(*sizes: int) -> list[int]:
        return rows(*(Piece(i, 0, size, 0) for i, size in enumerate(sizes)))

    assert documents(3, 4, 5) == [0, 12]
    assert documents(LEAST_ROW, 4, 5) == [0, LEAST_ROW, LEAST_ROW + 9]
    assert documents(1, LEAST_ROW - 2, 1, 9) == [0, LEAST_ROW, LEAST_ROW + 9]
    of_one_row = [Piece(7, 0, LEAST_ROW, 0), Piece(7, LEAST_ROW, LEAST_ROW + 5, LEAST_ROW)]
    assert rows(*of_one_row, Piece(8, 0, 2, 0)) == [0, LEAST_ROW + 5, LEAST_ROW + 7]


def test_parts_of_a_gang_keep_their_places() -> None:
    """Rank 0 of two has the first and the last quarter of 10 tokens; of a sequence of one token it has all."""
    gang = GangShare((10, 1), (2, 5), 0)
    pieces = (Piece(3, 0, 2, 0), Piece(3, 7, 10, 0), Piece(4, 0, 1, 0))
    batch = PackedBatch(torch.arange(6), torch.arange(6), pieces, gang)
    assert batch.positions().tolist() == [0, 1, 7, 8, 9, 0]
    assert batch.token_gids()[:, 1].tolist() == [0, 1, 7, 8, 9, 0]
    with pytest.raises(ValueError, match=r"rank 1 of 2 has 5 tokens of sequences of \[10, 1\], but the batch has 6"):
        PackedBatch(torch.arange(6), torch.arange(6), pieces, GangShare((10, 1), (2, 5), 1))


def test_moving_keeps_values_and_counts(device: str) -> None:
    batch = PackedBatch(**three_documents(), num_loss_tokens=4)
    moved = batch.to(device)
    assert moved.token_id_T.device.type == device
    assert torch.equal(moved.token_id_T.cpu(), batch.token_id_T)
    assert torch.equal(moved.target_T.cpu(), batch.target_T)
    assert (moved.pieces, moved.num_loss_tokens) == (batch.pieces, 4)
    assert moved.positions().tolist() == batch.positions().tolist()


def test_moving_does_not_count_again() -> None:
    meta = PackedBatch(**three_documents()).to("meta")  # counting on meta would raise
    assert (meta.num_tokens, meta.num_loss_tokens) == (6, 4)


def test_empty_lane() -> None:
    batch = PackedBatch.empty()
    assert (batch.num_tokens, batch.num_loss_tokens, batch.pieces) == (0, 0, ())
    assert batch.token_gids().shape == (0, 2)
    assert batch.positions().dtype == torch.int64
    assert batch.rows().tolist() == batch.offsets().tolist() == [0]


@pytest.mark.parametrize("name", ["token_id_T", "target_T"])
def test_wrong_dtype_or_shape_is_refused(name: str) -> None:
    given = three_documents()
    with pytest.raises(ValueError, match=r"PackedBatch\..* must be int64"):
        PackedBatch(**{**given, name: given[name].int()})
    with pytest.raises(ValueError, match=r"PackedBatch\..* must be int64"):
        PackedBatch(**{**given, name: given[name][None]})
    with pytest.raises(ValueError, match=r"of one length|must have the batch's"):
        PackedBatch(**{**given, name: given[name][:1]})


@pytest.mark.parametrize(
    ("pieces", "text"),
    [
        ((Piece(40, 0, 3, 0), Piece(41, 0, 2, 0)), "must have the batch's 6 tokens, got 5; name each token once"),
        ((Piece(40, 0, 6, 0), Piece(41, 2, 2, 2)), "a piece must have tokens"),
        ((Piece(40, 3, 9, 0),), "without a gang, begin with its document"),
    ],
)
def test_pieces_that_do_not_fit_are_refused(pieces: tuple[Piece, ...], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        PackedBatch(**{**three_documents(), "pieces": pieces})
