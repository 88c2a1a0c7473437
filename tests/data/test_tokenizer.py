import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrain.data.tokenizer import ByteTokenizer, tokenizer_named


@given(st.binary(max_size=300))
def test_any_bytes_round_trip(raw: bytes) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(raw)
    assert ids.dtype == np.uint16
    assert ids.tolist() == list(raw)
    assert tokenizer.decode_bytes(ids) == raw


def test_specials_and_text() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eod_id, tokenizer.vocab_size) == (256, 257, 258, 259)
    assert tokenizer.encode("é").tolist() == [0xC3, 0xA9]
    assert tokenizer.decode([257, 104, 105, 258, 256]) == "hi"
    assert tokenizer.decode([0xFF, 104]) == "\ufffdh"


@pytest.mark.parametrize("bad", [259, -1])
def test_ids_outside_the_vocabulary(bad: int) -> None:
    with pytest.raises(ValueError, match=rf"must be in \[0, 259\), got {bad} at 1"):
        ByteTokenizer().decode([5, bad])


def test_by_name() -> None:
    assert tokenizer_named("bytes") == ByteTokenizer()
    with pytest.raises(ValueError, match="did you mean 'bytes'"):
        tokenizer_named("byte")
