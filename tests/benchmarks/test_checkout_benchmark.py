"""What compare_checkouts.py makes of two versions' seconds, and the operators that it times."""

from typing import Any

import checkout_ops
import pytest
import step_contest
import torch
from compare_checkouts import summary
from torch import Tensor

from moetrain import ops
from moetrain.sequence import Item
from moetrain.sequence import batch as batches


def test_ratios_are_medians_of_older_over_newer() -> None:
    runs = {
        "older": [{"step": 4.0, "dense matmul": 1.0, "gone": 0.0}, {"step": 9.0, "dense matmul": 3.0, "gone": 0.0}] * 2,
        "newer": [{"step": 2.0, "dense matmul": 4.0, "gone": 1.0}],
    }
    assert summary(runs) == {"step_ratio": 3.25, "dense_matmul_ratio": 0.5}


def test_every_operator_can_be_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"T": 16, "D": 8, "F": 8, "E": 4, "K": 2, "HEADS": 1, "HEAD_DIM": 8, "ROWS": 2}.items():
        monkeypatch.setattr(checkout_ops, name, size)
    monkeypatch.setattr(checkout_ops, "SECONDS", 0.0)
    seconds = {name: checkout_ops.seconds_of(call) for name, call in checkout_ops.cases().items()}
    assert len(seconds) == 13
    assert all(value > 0 for value in seconds.values())


def test_an_older_attention_takes_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 5, 2, 8, generator=generator) for _ in range(3))
    newer = checkout_ops.attention_of(q, k, v)()
    flat = ops.causal_attention

    def of_rows(q_BSHd: Tensor, k_BSHd: Tensor, v_BSHd: Tensor, first_BS: Tensor) -> Tensor:
        """What checkouts before 2026-12 have: first tokens are counted in their rows."""
        rows = zip(q_BSHd, k_BSHd, v_BSHd, first_BS, strict=True)
        return torch.stack([flat(*row, torch.tensor([0, len(row[0])], dtype=torch.int32)) for row in rows])

    monkeypatch.setattr(ops, "causal_attention", of_rows)
    older = checkout_ops.attention_of(q, k, v)()
    assert torch.equal(older.flatten(0, 1), newer)
    monkeypatch.setattr(ops, "causal_attention", flat)
    joined = checkout_ops.attention_of(*(x.reshape(1, 15, 2, 8) for x in (q, k, v)))()
    assert (joined - newer).abs().max() > 0.1


@pytest.mark.parametrize("row_ids", [(4, 2), None])
def test_an_older_batch_has_the_same_rows(row_ids: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    item = None if row_ids is None else Item(0, 0, row_ids, (0,))
    flat = step_contest.batch_of(item, 6, 11)
    monkeypatch.delattr(batches, "Piece")
    monkeypatch.setattr(step_contest, "PackedBatch", lambda *fields: fields)
    older: Any = step_contest.batch_of(item, 6, 11)
    token_id_BS, target_BS, position_BS, document_BS, sequence_id_B = older
    assert sequence_id_B.tolist() == [piece.sequence for piece in flat.pieces] == list(row_ids or ())
    assert token_id_BS.shape == (len(row_ids or ()), 6)
    assert torch.equal(token_id_BS.flatten(), flat.token_id_T)
    assert torch.equal(target_BS.flatten(), flat.target_T)
    assert torch.equal(token_id_BS[:, 1:], target_BS[:, :-1])
    assert torch.equal(position_BS.flatten(), flat.positions())
    assert not document_BS.any()
    assert row_ids is None or not torch.equal(*token_id_BS), "rows in another order would be noticed"
