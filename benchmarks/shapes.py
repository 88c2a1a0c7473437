"""The shapes that expert kernels are measured at, by name, from kernel_shapes.toml.

T tokens, D model width, F hidden width of an expert, E experts, K experts per token, N = T * K pairs.
"""

import difflib
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOML = Path(__file__).parent / "kernel_shapes.toml"


@dataclass(frozen=True, slots=True)
class Shape:
    """One MoE layer with gated experts."""

    name: str
    T: int
    D: int
    F: int
    E: int
    K: int

    @property
    def num_pairs(self) -> int:
        """N, pairs of a token and an expert."""
        return self.T * self.K

    @property
    def forward_flop(self) -> int:
        """Products of the forward pass: two operations per multiply-add, three F x D matrices per pair."""
        return 6 * self.num_pairs * self.F * self.D

    @property
    def backward_flop(self) -> int:
        """Backward makes two products of each one of the forward pass; nothing recomputed is counted."""
        return 2 * self.forward_flop

    @property
    def forward_backward_flop(self) -> int:
        """Both passes."""
        return self.forward_flop + self.backward_flop

    def __str__(self) -> str:
        return f"{self.name} (T={self.T} D={self.D} F={self.F} E={self.E} K={self.K})"


def load_shapes() -> tuple[dict[str, Shape], tuple[str, ...]]:
    """All shapes by name, and the names of those that a CPU with two cores can time."""
    tables = tomllib.loads(TOML.read_text())
    small = [_shape(entry) for entry in tables["cpu_shape"]]
    large = [_shape(entry) for entry in tables["shape"]]
    return {shape.name: shape for shape in [*small, *large]}, tuple(shape.name for shape in small)


def published_tflops(name: str) -> dict[str, dict[str, float]]:
    """TFLOP/s that SonicMoE's paper shows on one H100: by phase, then by library; empty for shapes of our own."""
    for entry in tomllib.loads(TOML.read_text())["shape"]:
        if entry["name"] == name:
            return {"forward": entry["h100_forward"], "backward": entry["h100_backward"]}
    return {}


def choose_shapes(names: Sequence[str]) -> list[Shape]:
    """The shapes called ``names``, in that order; ``all-cpu`` stands for all small ones, ``all-gpu`` for the others.

    Raises:
        ValueError: no shape has that name.
    """
    shapes, small = load_shapes()
    groups = {"all-cpu": small, "all-gpu": tuple(name for name in shapes if name not in small)}
    wanted = [part for name in names for part in groups.get(name, (name,))]
    for name in wanted:
        if name not in shapes:
            near = difflib.get_close_matches(name, shapes, n=1)
            hint = f"did you mean {near[0]}?" if near else "choose one of them"
            raise ValueError(f"--shape must be all-cpu, all-gpu or one of {', '.join(shapes)}, got {name!r}; {hint}")
    return [shapes[name] for name in dict.fromkeys(wanted)]


def rounding_sweeps(num_tokens: int = 16384) -> list[Shape]:
    """The shapes at which token rounding is measured: four sweeps over the number of experts."""
    tables = tomllib.loads(TOML.read_text())
    return [
        Shape(
            f"D{entry['D']}-F{entry['F']}-K{entry['K']}-E{experts}",
            num_tokens,
            entry["D"],
            entry["F"],
            experts,
            entry["K"],
        )
        for entry in tables["rounding_sweep"]
        for experts in entry["E"]
    ]


def _shape(entry: dict[str, Any]) -> Shape:
    return Shape(**{field: entry[field] for field in ("name", "T", "D", "F", "E", "K")})
