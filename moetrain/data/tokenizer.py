"""Tokenizers. Bytes need no vocabulary file, take any text in any encoding, and suit small models."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrain.config.errors import require_one_of


@dataclass(frozen=True, slots=True)
class ByteTokenizer:
    """One token per byte, and three specials behind them."""

    name: str = "bytes"
    pad_id: int = 256
    bos_id: int = 257
    eod_id: int = 258
    vocab_size: int = 259

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest type that holds the vocabulary."""
        return np.dtype(np.uint16)

    def encode(self, text: bytes | str) -> NDArray[np.uint16]:
        """Tokens [T] of ``text`` (a str as UTF-8), without specials."""
        raw = text.encode() if isinstance(text, str) else text
        return np.frombuffer(raw, np.uint8).astype(np.uint16)

    def decode_bytes(self, token_ids: Iterable[int] | NDArray[Any]) -> bytes:
        """The bytes of ``token_ids``; specials vanish, an id outside the vocabulary raises ``ValueError``."""
        ids = np.asarray(token_ids if isinstance(token_ids, np.ndarray) else list(token_ids), np.int64)
        bad = (ids < 0) | (ids >= self.vocab_size)
        if bad.any():
            raise ValueError(
                f"ByteTokenizer: ids must be in [0, {self.vocab_size}), got {ids[bad][0]} at {bad.argmax()}"
            )
        return ids[ids < 256].astype(np.uint8).tobytes()

    def decode(self, token_ids: Iterable[int] | NDArray[Any]) -> str:
        """The same as text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(token_ids).decode(errors="replace")


def tokenizer_named(name: str) -> ByteTokenizer:
    """The tokenizer that a manifest names."""
    require_one_of("tokenizer", name, ("bytes",))
    return ByteTokenizer()
