"""How many ranks each axis of the two meshes has. Two meshes over the same ranks share the pipeline axis alone."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from moetrain.config.errors import NotBuiltYetError, nearest, require, require_at_least

ATTENTION_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
EXPERT_AXES = ("pp", "edp", "ep", "etp")


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshConfig:
    """Sizes of the axes; ``None`` means what remains of the world (at most one per mesh: dp_shard, edp)."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int | None = None
    cp: int = 1
    tp: int = 1
    edp: int | None = None
    ep: int = 1
    etp: int = 1
    ranks_per_node: int = 8
    two_level: bool = False  # tokens cross to a node once and are spread inside it

    def __post_init__(self) -> None:
        for field in ("pp", "dp_replicate", "cp", "tp", "ep", "etp", "ranks_per_node"):
            require_at_least(f"mesh.{field}", getattr(self, field), 1)
        for field in ("dp_shard", "edp"):
            if getattr(self, field) is not None:
                require_at_least(f"mesh.{field}", getattr(self, field), 1, "leave it out to use what remains")
        for field in ("pp", "cp"):
            if getattr(self, field) > 1:
                raise NotBuiltYetError(f"mesh.{field}", getattr(self, field), f"set mesh.{field} to 1")

    def resolve(self, world_size: int) -> "MeshConfig":
        """Fill in the axes left open, for ``world_size`` ranks; raise where no whole number fits."""
        require_at_least("world size", world_size, 1)
        dp_shard = self._fill("dp_shard", self.dp_shard, ("pp", "dp_replicate", "cp", "tp"), world_size)
        edp = self._fill("edp", self.edp, ("pp", "ep", "etp"), world_size)
        return replace(self, dp_shard=dp_shard, edp=edp)

    def _fill(self, open_axis: str, given: int | None, others: tuple[str, ...], world_size: int) -> int:
        known = prod(getattr(self, axis) for axis in others)
        text = " * ".join(f"{axis}={getattr(self, axis)}" for axis in others)
        if given is None:
            require(
                world_size % known == 0,
                f"mesh: {text} = {known} must divide the number of ranks, {world_size}; {_cure(others, world_size)}",
            )
            return world_size // known
        require(
            known * given == world_size,
            f"mesh: {text} * {open_axis}={given} is {known * given} but there are {world_size} ranks; "
            f"start {known * given} ranks, or leave {open_axis} out to use what remains",
        )
        return given


def parse_axes(text: str, field: str, legal: tuple[str, ...]) -> dict[str, int]:
    """Read ``"dp=2,tp=1"`` into ``{"dp": 2, "tp": 1}``; ``dp`` stands for ``dp_shard``."""
    sizes: dict[str, int] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, value = part.partition("=")
        axis = "dp_shard" if name == "dp" and "dp_shard" in legal else name
        if axis not in legal:
            near = nearest(axis, legal)
            hint = f"did you mean {near}?" if near else "choose one of these"
            raise ValueError(f"{field}: unknown axis {name!r}; legal axes are {', '.join(legal)}; {hint}")
        require(axis not in sizes, f"{field}: axis {name!r} is given twice; keep one of them")
        require(
            value.isascii() and value.isdigit() and int(value) >= 1,
            f"{field}: {name} must be a whole number of at least 1, got {value!r}; write for example {name}=2",
        )
        sizes[axis] = int(value)
    return sizes


def mesh_from_axes(attention: Mapping[str, int], experts: Mapping[str, int], *, ranks: int) -> MeshConfig:
    """A mesh for ``ranks`` ranks in which an unnamed axis is 1, except edp, which is what remains."""
    sizes: dict[str, Any] = {"dp_shard": 1, **attention, **experts}
    return MeshConfig(**sizes).resolve(ranks)


def _cure(axes: tuple[str, ...], world_size: int) -> str:
    divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
    return f"choose {' and '.join(axes)} so that their product is one of {', '.join(map(str, divisors))}"
