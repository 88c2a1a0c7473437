"""Two meshes over the same ranks, as arithmetic (MoE Parallel Folding, arXiv 2504.14960); no process groups here.

Attention sees pp x dp_replicate x dp_shard x cp x tp, experts see pp x edp x ep x etp. The axes named last are
innermost: neighbouring ranks differ in tp, and in etp. Only the pipeline axis, outermost in both, is shared.
"""

from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice, product
from math import prod
from typing import Any

from moetrain.config import RunConfig
from moetrain.config.errors import nearest, require, require_at_least, require_type
from moetrain.config.mesh import (
    ATTENTION_AXES,
    EXPERT_AXES,
    MeshConfig,
    axes_in_words,
    nearest_axes,
    nearest_factorisations,
)

AXIS_SETS = {
    "world": ATTENTION_AXES,
    "data": ("dp_replicate", "dp_shard", "cp"),
    "shard": ("dp_shard", "cp"),
    "pool": ("edp", "ep", "etp"),
    "dispatch": ("ep", "etp"),
}
NODE_SETS = ("ep_inside", "ep_between")  # what an ep group consists of where it spans nodes


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldedMesh:
    """Sizes of all axes, and which rank stands where. Ranks are global unless said otherwise.

    Raises:
        TypeError: a size is not a whole number.
        ValueError: a size is below 1, the two meshes do not have the same number of ranks per pipeline stage, or
            dispatch is to have two levels and an ep group has more ranks on one node than on another.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    edp: int = 1
    ep: int = 1
    etp: int = 1
    ranks_per_node: int = 8
    two_level: bool = False

    def __post_init__(self) -> None:
        for axis in (*ATTENTION_AXES, *EXPERT_AXES[1:], "ranks_per_node"):
            require_type(f"mesh.{axis}", getattr(self, axis), int)
            require_at_least(f"mesh.{axis}", getattr(self, axis), 1)
        require_type("mesh.two_level", self.two_level, bool)
        attention, experts = self._product(ATTENTION_AXES[1:]), self._product(EXPERT_AXES[1:])
        if attention == experts:
            if self.two_level:
                self._check_nodes()
            return
        legal = nearest_axes({axis: getattr(self, axis) for axis in EXPERT_AXES[1:]}, attention)
        raise ValueError(
            f"mesh: the two meshes must fold over the same ranks, but {self._text(ATTENTION_AXES[1:])} = {attention} "
            f"and {self._text(EXPERT_AXES[1:])} = {experts}; nearest legal expert axes: {legal}"
        )

    @classmethod
    def from_config(cls, config: MeshConfig, world_size: int) -> "FoldedMesh":
        """Resolve the axes that ``config`` leaves open for ``world_size`` ranks.

        Raises:
            ValueError: the axes do not divide ``world_size``.
        """
        return cls(**_sizes(config, world_size))

    @classmethod
    def of_run(cls, run: RunConfig, world_size: int) -> "FoldedMesh":
        """The mesh of a run: where experts move, rows go over all of edp x ep, which is one axis then, ep.

        Raises:
            ValueError: the axes do not divide ``world_size``, or nodes are not alike under ``mesh.two_level``.
        """
        return cls.of(run.mesh, world_size, moves=run.placement.moves)

    @classmethod
    def of(cls, config: MeshConfig, world_size: int, *, moves: bool) -> "FoldedMesh":
        """``from_config``, or where experts move, ``of_run``.

        Raises:
            ValueError: see there.
        """
        sizes = _sizes(config, world_size)
        if not moves:
            return cls(**sizes)
        merged = {**sizes, "edp": 1, "ep": sizes["edp"] * sizes["ep"]}
        mesh = cls(**{**merged, "two_level": False})
        require(
            not sizes["two_level"] or mesh.has_equal_nodes,
            f"mesh.two_level: where experts move, rows go over edp={sizes['edp']} * ep={sizes['ep']} = {mesh.ep} ranks "
            f"of each etp coordinate, which must have as many ranks on each of their nodes, but nodes have "
            f"{mesh.ranks_per_node} ranks; choose mesh.ranks_per_node, or set mesh.two_level to false",
        )
        return cls(**merged)

    @property
    def pool_size(self) -> int:
        """Ranks of one pipeline stage; they share the experts of that stage's layers."""
        return self.edp * self.ep * self.etp

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.pp * self.pool_size

    def size(self, axes: str | tuple[str, ...]) -> int:
        """Ranks in a group along ``axes`` (an axis, a named set of axes, or several of one mesh)."""
        return self._product(_expand(axes))

    def coordinate(self, rank: int, axis: str) -> int:
        """Where ``rank`` stands on ``axis``.

        Raises:
            ValueError: ``rank`` is outside the mesh, or ``axis`` is none of its axes.
        """
        self._check_rank(rank)
        (name,) = _expand((axis,))
        return rank // self._stride(name) % int(getattr(self, name))

    def pool_rank(self, rank: int) -> int:
        """Rank inside the expert pool of its pipeline stage: etp innermost, then ep, then edp."""
        self._check_rank(rank)
        return rank % self.pool_size

    def node_of(self, rank: int) -> int:
        """The machine that ``rank`` runs on, machines being filled in rank order."""
        self._check_rank(rank)
        return rank // self.ranks_per_node

    def group_of(self, rank: int, axes: str | tuple[str, ...]) -> tuple[int, ...]:
        """Ascending global ranks that differ from ``rank`` on ``axes`` alone (``rank`` among them).

        Args:
            rank: a global rank.
            axes: an axis, a named set (``AXIS_SETS``), several axes of one mesh, or one of ``NODE_SETS``: the ranks of
                the ep group on the same node ("ep_inside"), or in the same place on each node ("ep_between").

        Raises:
            ValueError: an unknown axis, or axes of both meshes at once.
        """
        if axes in NODE_SETS:
            (found,) = (ranks for ranks in self._by_node(self.group_of(rank, "ep"), axes) if rank in ranks)
            return found
        names = _expand(axes)
        root = rank - sum(self.coordinate(rank, axis) * self._stride(axis) for axis in names)
        return self._from_root(root, names)

    def all_groups(self, axes: str | tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
        """Every group along ``axes``, by ascending first rank; together they hold each rank once."""
        if axes in NODE_SETS:
            return tuple(sorted(part for ranks in self.all_groups("ep") for part in self._by_node(ranks, axes)))
        names = _expand(axes)
        fixed = [axis for axis in _mesh_of(names) if axis not in names]
        return tuple(self._from_root(root, names) for root in self._from_root(0, tuple(fixed)))

    def _by_node(self, ranks: tuple[int, ...], name: object) -> list[tuple[int, ...]]:
        """An ep group cut into the parts of it that ``name``, one of ``NODE_SETS``, stands for."""
        on_node: dict[int, list[int]] = {}
        for rank in ranks:
            on_node.setdefault(self.node_of(rank), []).append(rank)
        rows = list(on_node.values())
        if name == "ep_inside":
            return [tuple(row) for row in rows]
        return [tuple(row[place] for row in rows if place < len(row)) for place in range(max(map(len, rows)))]

    def _check_nodes(self) -> None:
        """Refuse ep groups with more ranks on one of their nodes than on another, or on more nodes than others."""
        if self.has_equal_nodes:
            return
        raise ValueError(
            f"mesh.two_level: all ep groups must have as many ranks on each of their nodes, but ep={self.ep} * "
            f"etp={self.etp} = {self.ep * self.etp} does not fit nodes of {self.ranks_per_node} ranks; nearest legal "
            f"axes: {axes_in_words(self._with_equal_nodes(3))}; or set mesh.two_level to false"
        )

    @property
    def has_equal_nodes(self) -> bool:
        """Whether dispatch could have two levels: each ep group has as many ranks on each node that it is on."""
        shares = {tuple(Counter(map(self.node_of, ranks)).values()) for ranks in self.all_groups("ep")}
        return len(shares) == 1 and len(set(*shares)) == 1

    def _with_equal_nodes(self, count: int) -> list[dict[str, int]]:
        """The sizes of edp and ep nearest to these that two levels could have; etp stays, as the model has a say."""
        sizes = nearest_factorisations((None, self.ep), self.pool_size // self.etp, count=None)
        plain = replace(self, two_level=False)
        legal = ((edp, ep) for edp, ep in sizes if replace(plain, edp=edp, ep=ep).has_equal_nodes)
        return [{"edp": edp, "ep": ep, "etp": self.etp} for edp, ep in islice(legal, count)]

    def _from_root(self, root: int, names: tuple[str, ...]) -> tuple[int, ...]:
        steps = [range(0, getattr(self, axis) * self._stride(axis), self._stride(axis)) for axis in names]
        return tuple(sorted(root + sum(offsets) for offsets in product(*steps)))

    def _stride(self, axis: str) -> int:
        mesh = ATTENTION_AXES if axis in ATTENTION_AXES else EXPERT_AXES
        return self._product(mesh[mesh.index(axis) + 1 :])

    def _product(self, axes: tuple[str, ...]) -> int:
        return prod(getattr(self, axis) for axis in axes)

    def _text(self, axes: tuple[str, ...]) -> str:
        return " * ".join(f"{axis}={getattr(self, axis)}" for axis in axes)

    def _check_rank(self, rank: int) -> None:
        require(
            0 <= rank < self.world_size,
            f"mesh: rank must be between 0 and {self.world_size - 1}, got {rank}; the mesh has {self.world_size} ranks",
        )


def _sizes(config: MeshConfig, world_size: int) -> dict[str, Any]:
    """All fields of the mesh, axes that ``config`` leaves open resolved."""
    resolved = config.resolve(world_size)
    return {
        name: getattr(resolved, name) for name in (*ATTENTION_AXES, *EXPERT_AXES[1:], "ranks_per_node", "two_level")
    }


def _mesh_of(names: tuple[str, ...]) -> tuple[str, ...]:
    return ATTENTION_AXES if all(axis in ATTENTION_AXES for axis in names) else EXPERT_AXES


def _expand(axes: str | tuple[str, ...]) -> tuple[str, ...]:
    """Axis names of one mesh, or raise."""
    names = AXIS_SETS.get(axes, (axes,)) if isinstance(axes, str) else axes
    known = (*ATTENTION_AXES, *EXPERT_AXES[1:])
    for name in names:
        if name not in known:
            near = nearest(name, (*known, *AXIS_SETS))
            hint = f"did you mean {near!r}?" if near else "choose one of these"
            raise ValueError(
                f"mesh: unknown axis {name!r}; axes are {', '.join(known)}, sets {', '.join(AXIS_SETS)}; {hint}"
            )
    require(
        set(names) <= set(ATTENTION_AXES) or set(names) <= set(EXPERT_AXES),
        f"mesh: axes {', '.join(names)} belong to different meshes; take them all from "
        f"{', '.join(ATTENTION_AXES)} or all from {', '.join(EXPERT_AXES)}",
    )
    return tuple(names)
