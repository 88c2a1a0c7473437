"""What a sequence costs on the ranks that share it, for planners that choose how many these are.

Forward and backward pass apart, each, for an item of a plan, some sequences of s tokens on d ranks, in milliseconds:

    max(square sum(s^2) / d, (d - 1) (hop + hop_token sum(s) / d)) + token sum(s) / d + item

(ByteScale, arXiv 2502.21231, section 5, with what a ring sends beside it: it is under way while attention computes, and
sequences of one item share its messages).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from moetrain.config.errors import require


@dataclass(frozen=True, slots=True, kw_only=True)
class PassCosts:
    """Milliseconds of one pass through the whole model."""

    square_ms: float  # per squared token: causal attention
    token_ms: float  # per token: everything else
    item_ms: float = 0.0  # per item of a plan
    hop_ms: float = 0.0  # per message of a ring
    hop_token_ms: float = 0.0  # per token that a rank sends on

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            require(
                math.isfinite(value) and value >= 0,
                f"PassCosts.{item.name} must be finite and at least 0, got {value}; measure again",
            )

    def of_item(self, lengths: Sequence[int], num_ranks: int = 1) -> float:
        """Time of sequences of these lengths, the formula above."""
        share, others = sum(lengths) / num_ranks, num_ranks - 1
        square_ms = self.square_ms * sum(n * n for n in lengths) / num_ranks
        ring_ms = others * (self.hop_ms + self.hop_token_ms * share)
        return max(square_ms, ring_ms) + self.token_ms * share + self.item_ms


@dataclass(frozen=True, slots=True)
class SequenceCosts:
    """Both passes."""

    forward: PassCosts
    backward: PassCosts

    def ms(self, num_tokens: int, num_ranks: int = 1) -> float:
        """Time of one sequence on ``num_ranks`` that share it.

        >>> round(UNMEASURED_SEQUENCES.ms(8192), 3) > round(UNMEASURED_SEQUENCES.ms(8192, 2), 3)
        True
        """
        return self.of_item((num_tokens,), num_ranks)

    def of_item(self, lengths: Sequence[int], num_ranks: int = 1) -> float:
        """Time of sequences that ``num_ranks`` share in one item."""
        return self.forward.of_item(lengths, num_ranks) + self.backward.of_item(lengths, num_ranks)

    def numbers(self) -> list[float]:
        """Forward then backward, in the order of ``PassCosts``: as ``plan_sequences`` takes them."""
        return [getattr(one, item.name) for one in (self.forward, self.backward) for item in fields(PassCosts)]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "SequenceCosts":
        """What ``to_json`` gave.

        Raises:
            ValueError: it is something else.
        """
        try:
            return cls(PassCosts(**values["forward"]), PassCosts(**values["backward"]))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"costs of sequences must have forward and backward, of {', '.join(f.name for f in fields(PassCosts))} "
                f"each, got {dict(values)}; profile the run again"
            ) from error


# A layer of the paper's 7B model, after its chart (32K tokens: attention 14.1 ms, the rest 7.5 ms), backward 2.5 and 2
# times as long; keys and values of 2 KiB a token at 50 GB/s, 10 us a message (the link and the size are assumptions).
UNMEASURED_SEQUENCES = SequenceCosts(
    PassCosts(square_ms=1.1e-8, token_ms=2.3e-4, item_ms=0.02, hop_ms=0.01, hop_token_ms=4.0e-5),
    PassCosts(square_ms=2.75e-8, token_ms=4.6e-4, item_ms=0.02, hop_ms=0.01, hop_token_ms=1.2e-4),
)
