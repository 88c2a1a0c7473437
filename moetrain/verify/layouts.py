"""Which layouts of a number of ranks are legal, and which of them is most like one that is not."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from moetrain.config import ATTENTION_AXES, EXPERT_AXES, MeshConfig, mesh_from_axes, parse_axes
from moetrain.config.errors import require, require_divides
from moetrain.config.mesh import nearest_factorisations
from moetrain.mesh.folded_mesh import FoldedMesh


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What ``--ranks``, ``--mesh`` and ``--experts`` ask for, and what it has to fit: sizes of the model, and nodes."""

    ranks: int
    mesh: str
    experts: str
    num_heads: int
    expert_width: int
    ranks_per_node: int = 8
    two_level: bool = False
    moves: bool = False  # whether experts do, so that rows go over edp and ep together

    def resolve(self) -> MeshConfig:
        """The mesh.

        Raises:
            ValueError: the axes do not fit the ranks, or are not built; the nearest legal layouts are listed.
        """
        wanted: dict[str, int] = {}
        try:
            attention = parse_axes(self.mesh, "--mesh", ATTENTION_AXES)
            wanted |= attention
            experts = parse_axes(self.experts, "--experts", EXPERT_AXES[1:])
            wanted |= experts
            return self._mesh(attention, experts)
        except ValueError as error:
            layouts = "; ".join(self.nearest(wanted))
            raise ValueError(f"{error}. Nearest legal layouts of --ranks {self.ranks}: {layouts}") from error

    def accepts(self) -> bool:
        """Whether ``resolve`` gives a mesh."""
        try:
            self._mesh(
                parse_axes(self.mesh, "--mesh", ATTENTION_AXES), parse_axes(self.experts, "--experts", EXPERT_AXES[1:])
            )
        except ValueError:
            return False
        return True

    def _mesh(self, attention: Mapping[str, int], experts: Mapping[str, int]) -> MeshConfig:
        given: dict[str, Any] = {**attention, **experts}
        MeshConfig(**given)  # refuses what is not built
        require_divides("mesh.tp", attention.get("tp", 1), "model.num_heads", self.num_heads)
        require_divides("mesh.etp", experts.get("etp", 1), "moe.expert_width", self.expert_width)
        self._require_fit("--mesh", self.mesh, math.prod(attention.values()), exact=True)
        shared = {"pp": attention.get("pp", 1), **experts}
        self._require_fit("--experts", self.experts, math.prod(shared.values()), exact="edp" in experts)
        mesh = mesh_from_axes(attention, experts, ranks=self.ranks)
        mesh = replace(mesh, ranks_per_node=self.ranks_per_node, two_level=self.two_level)
        FoldedMesh.of(mesh, self.ranks, moves=self.moves)  # refuses nodes that are not alike
        return mesh

    def _require_fit(self, option: str, given: str, product: int, *, exact: bool) -> None:
        fits = self.ranks == product if exact else self.ranks % product == 0
        bound = "" if exact else "a divisor of "
        require(
            fits,
            f"{option}: the axes must multiply to {bound}--ranks {self.ranks}, but {given or 'nothing'!r} "
            f"gives {product}, since an unnamed axis is 1",
        )

    def nearest(self, wanted: Mapping[str, int], count: int = 3) -> list[str]:
        """Legal layouts of as many ranks, the ones most like ``wanted`` first, as command-line options.

        Where dispatch in two levels is asked for, only layouts that it takes.
        """

        def divides(size: int) -> Any:
            return lambda factor: size % factor == 0

        attention = nearest_factorisations(
            (1, 1, 1), self.ranks, count=None, fits=[None, None, divides(self.num_heads)]
        )
        experts = nearest_factorisations(
            (1, 1, 1), self.ranks, count=None, fits=[None, divides(self.expert_width), None]
        )
        layouts = [
            dict(zip(("dp_replicate", "dp_shard", "tp", "ep", "etp", "edp"), (*first, *second), strict=True))
            for first in sorted(attention)
            for second in sorted(experts)
        ]

        def distance(layout: dict[str, int]) -> float:
            return sum(
                abs(math.log(size / wanted.get(axis, 1 if axis in ("dp_replicate", "tp", "etp") else size)))
                for axis, size in layout.items()
            )

        def is_taken(layout: dict[str, int]) -> bool:
            sizes: dict[str, Any] = {**layout, "ranks_per_node": self.ranks_per_node}
            return not self.two_level or FoldedMesh(**sizes).has_equal_nodes

        return [_options(layout) for layout in islice(filter(is_taken, sorted(layouts, key=distance)), count)]


def _options(layout: dict[str, int]) -> str:
    attention = [f"{name}={layout[axis]}" for name, axis in (("dp_replicate",) * 2, ("tp",) * 2) if layout[axis] > 1]
    attention.insert(len(attention) - (layout["tp"] > 1), f"dp={layout['dp_shard']}")
    experts = [f"{axis}={layout[axis]}" for axis in ("ep", "edp", "etp") if axis != "etp" or layout[axis] > 1]
    return f"--mesh {','.join(attention)} --experts {','.join(experts)}"
