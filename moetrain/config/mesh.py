"""How many ranks each axis of the two meshes has. Two meshes over the same ranks share the pipeline axis alone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt, log, prod
from typing import Any

from moetrain.config.errors import NotBuiltYetError, nearest, require, require_at_least
from moetrain.config.fields import check_fields, setting

ATTENTION_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
EXPERT_AXES = ("pp", "edp", "ep", "etp")
Fits = Callable[[int], bool]  # whether an axis may have a size


@dataclass(frozen=True, slots=True, kw_only=True)
class MeshConfig:
    """Sizes of the axes of two meshes over all ranks: pp * dp_replicate * dp_shard * cp * tp = pp * edp * ep * etp."""

    pp: int = setting(
        1, "Pipeline stages, the one axis of both meshes; more than 1 is not built yet.", unit="ranks", least=1
    )
    dp_replicate: int = setting(
        1, "Copies of the dense parameters, whose gradients are summed (HSDP).", unit="ranks", least=1
    )
    dp_shard: int | None = setting(
        None,
        "Shards that each copy of the dense parameters is kept in (FSDP2); none is what remains of the ranks.",
        unit="ranks",
        least=1,
        cure="leave it out to use what remains",
    )
    cp: int = setting(
        1,
        "Ranks that share each sequence (context parallelism), under sequence.planner context.",
        unit="ranks",
        least=1,
    )
    tp: int = setting(
        1,
        "Ranks that share heads, dense MLPs, shared experts and vocabulary (tensor parallelism).",
        unit="ranks",
        least=1,
    )
    edp: int | None = setting(
        None,
        "Ranks that hold each shard of an expert, and sum its gradients; none is what remains of the ranks.",
        unit="ranks",
        least=1,
        cure="leave it out to use what remains",
    )
    ep: int = setting(1, "Ranks that experts are spread over, and tokens sent among.", unit="ranks", least=1)
    etp: int = setting(1, "Shards that each expert is cut into, along its width.", unit="ranks", least=1)
    ranks_per_node: int = setting(8, "Ranks of a node; they are numbered node after node.", unit="ranks", least=1)
    two_level: bool = setting(
        False, "Send a token once to each node that it is needed on, and spread it inside the node."
    )

    def __post_init__(self) -> None:
        check_fields(self, "mesh")
        if self.pp > 1:
            raise NotBuiltYetError("mesh.pp", self.pp, "set mesh.pp to 1")

    def resolve(self, world_size: int, *, fits: Mapping[str, Fits] | None = None) -> "MeshConfig":
        """Fill in the axes left open, for ``world_size`` ranks; raise where no whole number fits.

        ``fits`` says, by axis, which sizes the model allows (divisors of the heads for tp): the error names only legal
        alternatives.
        """
        require_at_least("world size", world_size, 1)
        dp_shard = self._fill(ATTENTION_AXES, "dp_shard", world_size, fits or {})
        edp = self._fill(EXPERT_AXES, "edp", world_size, fits or {})
        return replace(self, dp_shard=dp_shard, edp=edp)

    def nearest_legal(self, mesh: Sequence[str], world_size: int, *, fits: Mapping[str, Fits]) -> str:
        """What to choose instead of the axes of ``mesh`` (``ATTENTION_AXES`` or ``EXPERT_AXES``), in words."""
        return nearest_axes({axis: getattr(self, axis) for axis in self._open(mesh)}, world_size, fits=fits)

    def _open(self, mesh: Sequence[str]) -> tuple[str, ...]:
        """The axes of ``mesh`` but pp, which is 1 as yet, and cp where it is 1: another planner goes with more."""
        return tuple(axis for axis in mesh if axis != "pp" and (axis != "cp" or self.cp > 1))

    def _fill(self, mesh: Sequence[str], open_axis: str, world_size: int, fits: Mapping[str, Fits]) -> int:
        """The size of ``open_axis``, given or what remains."""
        sizes: dict[str, int | None] = {axis: getattr(self, axis) for axis in self._open(mesh)}
        given = sizes.pop(open_axis)
        known = prod(size or 1 for size in sizes.values())
        text = " * ".join(f"{axis}={size}" for axis, size in sizes.items())
        legal = self.nearest_legal(mesh, world_size, fits=fits)
        if given is None:
            require(
                world_size % known == 0,
                f"mesh: {text} = {known} must divide the number of ranks, {world_size}; nearest legal axes: {legal}",
            )
            return world_size // known
        require(
            known * given == world_size,
            f"mesh: {text} * {open_axis}={given} is {known * given} but there are {world_size} ranks; "
            f"start {known * given} ranks, or leave {open_axis} out to use what remains; nearest legal axes: {legal}",
        )
        return given


def parse_axes(text: str, field: str, legal: tuple[str, ...]) -> dict[str, int]:
    """Sizes by axis; ``dp`` stands for ``dp_shard`` where that is legal.

    >>> parse_axes("dp=2, tp=1", "--mesh", ATTENTION_AXES)
    {'dp_shard': 2, 'tp': 1}
    """
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


def nearest_axes(wanted: Mapping[str, int | None], total: int, *, fits: Mapping[str, Fits] | None = None) -> str:
    """The ways to give ``total`` ranks to axes that are most like ``wanted``, in words; None is as good as any size.

    >>> nearest_axes({"edp": None, "ep": 3, "etp": 1}, 8)
    'edp=2 ep=4 etp=1, or edp=4 ep=2 etp=1, or edp=1 ep=8 etp=1'
    """
    allowed = [(fits or {}).get(axis) for axis in wanted]
    found = nearest_factorisations(tuple(wanted.values()), total, fits=allowed)
    return axes_in_words([dict(zip(wanted, sizes, strict=True)) for sizes in found])


def axes_in_words(choices: Sequence[Mapping[str, int]]) -> str:
    """Alternatives in one line.

    >>> axes_in_words([{"edp": 2, "ep": 4}, {"edp": 4, "ep": 2}])
    'edp=2 ep=4, or edp=4 ep=2'
    """
    return ", or ".join(" ".join(f"{axis}={size}" for axis, size in sizes.items()) for sizes in choices)


def nearest_factorisations(
    sizes: Sequence[int | None], total: int, *, count: int | None = 3, fits: Sequence[Fits | None] = ()
) -> list[tuple[int, ...]]:
    """The ``count`` ways to write ``total`` as a product of ``len(sizes)`` factors that change ``sizes`` least.

    Change is the sum over axes of |log(new / old)|, nothing for an axis whose size is None; ties go to the larger first
    factors. A factor must satisfy its entry of ``fits``, where there is one. All ways where ``count`` is None.

    >>> nearest_factorisations((3, 1), 8, fits=[None, lambda size: size <= 2])
    [(8, 1), (4, 2)]
    """
    allowed = [*fits, *[None] * (len(sizes) - len(fits))]

    def change(factors: tuple[int, ...]) -> float:
        return round(sum(abs(log(new / old)) for new, old in zip(factors, sizes, strict=True) if old), 9)

    legal = [
        factors
        for factors in _factorisations(total, len(sizes))
        if all(may is None or may(factor) for factor, may in zip(factors, allowed, strict=True))
    ]
    return sorted(legal, key=lambda factors: (change(factors), tuple(-factor for factor in factors)))[:count]


def _factorisations(total: int, num_factors: int) -> Iterator[tuple[int, ...]]:
    if num_factors == 1:
        yield (total,)
        return
    small = [divisor for divisor in range(1, isqrt(total) + 1) if total % divisor == 0]
    for divisor in sorted({*small, *(total // divisor for divisor in small)}):
        for rest in _factorisations(total // divisor, num_factors - 1):
            yield (divisor, *rest)
