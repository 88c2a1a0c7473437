"""Lengths of real data, to plan with before there is any.

Shares of tokens by length are those of ByteScale's figures (arXiv 2502.21231), read off charts and prose: of GitHub's
bins from 4K to 128K, and inside some of Byted's, the order is a guess.
"""

from types import MappingProxyType

import numpy as np

from moetrain.config.errors import require, require_at_least, require_one_of
from moetrain.sequence.plan import Ints

FIRST_EDGE = 4096  # tokens of the longest sequence of the first bin; each next one goes to twice as many
SHORTEST = 64
SHARES: MappingProxyType[str, tuple[float, ...]] = MappingProxyType(
    {  # percent of tokens, by bin
        "github": (34.0, 14.2, 10.4, 10.2, 7.6, 7.6, 6.4, 4.5, 2.0, 1.6, 1.6),
        "byted": (11.4, 10.7, 9.5, 8.8, 7.6, 7.6, 7.3, 9.7, 7.6, 7.6, 12.1),
    }
)


def draw_lengths(name: str, num_tokens: int, context: int, *, seed: int = 0, scale: int = 1) -> Ints:
    """Draw sequences of about ``num_tokens`` tokens in all.

    Args:
        name: ``github`` or ``byted``.
        num_tokens: in all; the last sequence is cut to it.
        context: tokens of the longest sequence; longer ones are cut, their rest is a sequence of its own.
        seed: of the draw.
        scale: divides all lengths, for experiments on a few small ranks.

    Returns:
        int64 [N], at least 1 each.
    """
    require_one_of("lengths", name, tuple(SHARES))
    require_at_least("num_tokens", num_tokens, 1)
    require(context >= 1 and scale >= 1, f"context and scale must be at least 1, got {context} and {scale}")
    shares = np.array(SHARES[name])
    edges = FIRST_EDGE * 2.0 ** np.arange(len(shares))
    lows = np.concatenate([[SHORTEST], edges[:-1]])
    # Sequences of a bin are drawn evenly over the logarithm of their length: of so many tokens on average.
    means = (edges - lows) / np.log(edges / lows)
    chances = shares / means
    generator = np.random.Generator(np.random.Philox(seed))
    found: list[Ints] = []
    total = 0
    while total < num_tokens:
        bins = generator.choice(len(shares), size=4096, p=chances / chances.sum())
        lengths = np.exp(generator.uniform(np.log(lows[bins]), np.log(edges[bins])))
        drawn = _cut(np.maximum(1, (lengths / scale).astype(np.int64)), context)
        found.append(drawn)
        total += int(drawn.sum())
    lengths = np.concatenate(found)
    ends = np.cumsum(lengths)
    last = int(np.searchsorted(ends, num_tokens))
    lengths = lengths[: last + 1].copy()
    lengths[-1] -= ends[last] - num_tokens
    return lengths


def _cut(lengths: Ints, context: int) -> Ints:
    parts = -(-lengths // context)
    place = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    return np.minimum(np.repeat(lengths, parts) - place * context, context)
