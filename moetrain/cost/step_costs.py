"""What a step spends on one MoE layer: a model of few numbers, measured elsewhere, by which placements are compared.

A layer takes as long as its worst group: what it computes, the rows it sends or receives, and of the replicas' weights
what other work does not hide. Rows count once per (token, expert) pair; an assignment per token saves some of them.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from torch import Tensor

from moetrain.config.errors import require


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds of one group (the ranks that hold the shards of one expert), forward and backward together.

    Attributes:
        pair_s: to compute one (token, expert) pair.
        near_row_s: to move one row between groups of a node, there and back, and its gradient.
        far_row_s: the same between nodes.
        weight_byte_s: to move one byte of weights or of their gradients.
        expert_bytes: what one replica moves: weights in, gradients out.
        overlap_s: how much of that other work of the layer hides.

    Raises:
        ValueError: a number is negative or not finite.
    """

    pair_s: float
    near_row_s: float
    far_row_s: float
    weight_byte_s: float
    expert_bytes: float
    overlap_s: float

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            require(
                math.isfinite(value) and value >= 0,
                f"costs.{field.name} must be finite and at least 0, got {value}; measure it again",
            )

    def to_dict(self) -> dict[str, float]:
        """As JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, float]) -> "StepCosts":
        """What ``to_dict`` gave.

        Raises:
            ValueError: other names, or numbers that are no costs.
        """
        names = [field.name for field in fields(StepCosts)]
        require(
            sorted(values) == sorted(names) and all(isinstance(value, int | float) for value in values.values()),
            f"costs must be numbers called {', '.join(names)}, got {dict(values)}; measure them again",
        )
        return StepCosts(**{name: float(values[name]) for name in names})

    @property
    def expert_s(self) -> float:
        """Seconds that a replica takes."""
        return self.weight_byte_s * self.expert_bytes

    @property
    def overlap_degree(self) -> int:
        """How many replicas other work hides; Hecate's t (arXiv 2502.02581, section 4)."""
        most = 2**31 - 1
        return most if self.expert_s * most <= self.overlap_s else int(self.overlap_s / self.expert_s)

    def layer_s(self, *, pairs: float, near_rows: float, far_rows: float, replicas: float) -> float:
        """Seconds of a layer whose worst group computes, moves and receives so much."""
        exposed_s = max(0.0, replicas * self.expert_s - self.overlap_s)
        return pairs * self.pair_s + near_rows * self.near_row_s + far_rows * self.far_row_s + exposed_s

    def layers_s(self, measure_L4: Tensor) -> list[float]:
        """The same for each layer of what ``moetrain.ops.measure_placements`` gives."""
        return [
            self.layer_s(pairs=pairs, near_rows=near, far_rows=far, replicas=replicas)
            for pairs, near, far, replicas in measure_L4.tolist()
        ]


# A row between nodes costs as much as three on a node, or as a pair; replicas cost nothing. Until costs are measured.
UNMEASURED = StepCosts(pair_s=1e-6, near_row_s=3e-7, far_row_s=1e-6, weight_byte_s=0.0, expert_bytes=0.0, overlap_s=0.0)
