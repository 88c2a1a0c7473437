"""Parts of sequences on the ranks of a gang."""

import pytest
import torch

from moetrain.ops.reference_attend import seen_by_segments
from moetrain.sequence.zigzag import Zigzag


def positions_of(parts: Zigzag, rank: int) -> torch.Tensor:
    """Of each of the rank's tokens, in its own sequence."""
    pieces = [torch.arange(begin, end) for _, begin, end in parts.pieces(rank)]
    return torch.cat([torch.empty(0, dtype=torch.int64), *pieces])


LENGTHS = ([0], [1], [7], [8], [101], [5, 0, 12, 1])


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_every_token_has_one_rank_and_ranks_have_as_many(lengths: list[int], num_ranks: int) -> None:
    parts = Zigzag(lengths, num_ranks)
    for i, length in enumerate(lengths):
        held = [token for rank in range(num_ranks) for part in parts.parts(i, rank) for token in range(*part)]
        assert sorted(held) == list(range(length))
        sizes = [sum(end - begin for begin, end in parts.parts(i, rank)) for rank in range(num_ranks)]
        assert max(sizes) - min(sizes) <= 2
    for rank in range(num_ranks):
        pieces = parts.pieces(rank)
        assert len(positions_of(parts, rank)) == parts.size(rank)
        assert all(begin < end for _, begin, end in pieces)
        assert sorted(pieces) == pieces
        for i in range(len(lengths)):
            (_, early_end), (late_begin, _) = parts.parts(i, rank)
            assert early_end <= late_begin


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_what_is_seen_in_parts_is_what_causal_attention_sees(lengths: list[int], num_ranks: int) -> None:
    parts = Zigzag(lengths, num_ranks)
    owner = [
        torch.repeat_interleave(
            torch.arange(len(lengths)),
            torch.tensor([sum(end - begin for begin, end in parts.parts(i, rank)) for i in range(len(lengths))]),
        )
        for rank in range(num_ranks)
    ]
    for rank in range(num_ranks):
        for source in range(num_ranks):
            seen = parts.seen(rank, source)
            got = seen_by_segments(
                parts.size(rank), parts.size(source), seen.range_q_S2, seen.range_k_S2, causal=seen.causal
            )
            same = owner[rank][:, None] == owner[source]
            want = same & (positions_of(parts, source) <= positions_of(parts, rank)[:, None])
            assert torch.equal(got, want)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="Zigzag: num_ranks must be at least 1, got 0"):
        Zigzag([3], 0)
    with pytest.raises(ValueError, match=r"lengths must be at least 0, got \[3, -1\]"):
        Zigzag([3, -1], 2)
