"""Where the experts of a layer are now: planners replace a placement between micro-batches, a layer reads it."""

from moetrain.config.errors import require
from moetrain.placement.placement import Placement


class CurrentPlacement:
    """The newest placement of one layer. All ranks of the pool set the same one at the same moment.

    Whoever began something with a placement ends it with that one: a dispatch, and the backward pass of a micro-batch.
    """

    def __init__(self, placement: Placement) -> None:
        self._placement = placement

    @property
    def now(self) -> Placement:
        """What the next micro-batch starts with."""
        return self._placement

    def set(self, placement: Placement) -> None:
        """Replace it.

        Raises:
            ValueError: the new one is over other experts, groups, shards or slices.
        """
        old, new = _sizes(self._placement), _sizes(placement)
        require(
            old == new,
            f"CurrentPlacement.set: a layer's experts, groups, shards and slices stay what they are, {old}, got {new}; "
            "plan for the same pool",
        )
        self._placement = placement


def _sizes(placement: Placement) -> tuple[int, int, int, int]:
    return placement.num_experts, placement.num_groups, placement.num_shards, placement.num_slices
