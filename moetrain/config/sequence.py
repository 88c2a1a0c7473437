"""Which ranks compute which sequences of a step."""

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from moetrain.config.errors import require, require_storable
from moetrain.config.fields import check_fields, setting

SequencePlanner = Literal["data", "context", "bytescale", "moetrain"]
MODELLED, MEASURED = "modelled", "measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceConfig:
    """How a step's sequences are dealt out to ranks and rounds."""

    planner: SequencePlanner = setting(
        "data",
        "How many ranks share a sequence: data for one, context for mesh.cp of them, bytescale for as few as hold it, "
        "moetrain for as many as level the work.",
    )
    capacity: int | None = setting(
        None,
        "Tokens whose activations a rank can hold in one round; none is data.micro_batch rows, or what the longest "
        "document asks for.",
        unit="tokens",
        least=1,
        cure="leave it out for a default",
    )
    costs: str = setting(
        MODELLED,
        f"What planners that weigh work weigh by: {MODELLED} costs, those {MEASURED} when the run begins (--profile), "
        "or the profile.json of a run that did so.",
    )
    offload: float = setting(
        0.0,
        "Share of the activations of a round that wait on the host between forward and backward pass, where rounds are "
        "filled by tokens: a rank then holds more of them.",
        least=0.0,
        most=1.0,
    )

    def __post_init__(self) -> None:
        check_fields(self, "sequence")
        require_storable("sequence.costs", self.costs)
        require(
            self.costs == MODELLED or self.weighs_work,
            f"sequence.costs ({self.costs}) are what sequence.planner bytescale or moetrain weigh by, but the planner "
            f"is {self.planner}; choose one of these, or leave --profile and sequence.costs out",
        )

    @property
    def costs_file(self) -> Path | None:
        """Where costs are read from, if that is so."""
        return None if self.costs in (MODELLED, MEASURED) else Path(self.costs)

    @property
    def has_gangs(self) -> bool:
        """Whether several ranks may share a sequence."""
        return self.planner != "data"

    @property
    def weighs_work(self) -> bool:
        """Whether each sequence gets the ranks that its length asks for."""
        return self.planner in ("bytescale", "moetrain")


def largest_share(num_tokens: int, num_ranks: int) -> int:
    """Tokens that one of ``num_ranks`` has at most of a sequence: two of 2d parts, cut as ``moetrain.sequence`` does.

    >>> largest_share(10, 1), largest_share(10, 3)
    (10, 4)
    """
    cuts = [part * num_tokens // (2 * num_ranks) for part in range(2 * num_ranks + 1)]
    sizes = [end - begin for begin, end in pairwise(cuts)]
    return max(early + late for early, late in zip(sizes, reversed(sizes), strict=True))


def largest_share_up_to(num_tokens: int, num_ranks: int) -> int:
    """Tokens that one of ``num_ranks`` has at most of any sequence of up to ``num_tokens``.

    A shorter one may give a rank more, as both of its parts may be rounded up:

    >>> largest_share(4, 4), largest_share(3, 4), largest_share_up_to(4, 4)
    (1, 2, 2)
    """
    full, left = divmod(num_tokens, 2 * num_ranks)
    most = 2 * full
    for n in range(num_tokens, num_tokens - left, -1):  # shorter ones still have parts of at most ``full``
        most = max(most, largest_share(n, num_ranks))
        if most == 2 * full + 2:
            break
    return most
