"""Loads of a run, written by training and read by whoever studies placements: `.npz` files. No torch in here.

A trace is one file, or a folder of pieces that follow one another. Each has

    count   int32 [step, layer, source, expert]: pairs of a source's tokens for an expert, after all rules
    step    int64 [step]: the steps' numbers from 1, as in ``metrics.jsonl``, without a gap
    layer   int32 [layer]: indices of the MoE layers
    about   text: JSON of ``TraceFacts``

A source is a group of ranks that hold the shards of one expert (without ``etp``: a rank). Of a file that another
program wrote ``count`` is enough.
"""

import io
import json
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrain.config.errors import require, require_at_least, require_divides
from moetrain.config.files import write_whole

FORMAT = "moetrain-loads"  # stands in every file that a run writes
ARRAYS = ("count", "step", "layer", "about")
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)
PIECE = re.compile(r"loads-(\d{8,})\.npz")  # by the number of its first step


@dataclass(frozen=True, slots=True)
class TraceFacts:
    """What is not a count.

    Attributes:
        groups_per_node: consecutive sources that share a node.
        planner: that had placed the experts; loads do not depend on it.
        top_k: experts per token; 0 where nobody has said.
        width: of the model, D.
        expert_width: of an expert, F.
        gated: whether an expert has a gate.
        costs: ``StepCosts.to_dict`` as that run had measured them; empty where it had not.

    Raises:
        ValueError: ``groups_per_node`` is below 1.
    """

    groups_per_node: int = 1
    planner: str = ""
    top_k: int = 0
    width: int = 0
    expert_width: int = 0
    gated: bool = False
    costs: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_at_least("trace: groups_per_node", self.groups_per_node, 1)

    def to_text(self) -> str:
        """As JSON."""
        return json.dumps({"format": FORMAT, **asdict(self)})

    @staticmethod
    def from_text(text: str) -> "TraceFacts":
        """What ``to_text`` gave; what is not known is left out.

        Raises:
            ValueError: it is no JSON object.
        """
        values = json.loads(text)
        require(isinstance(values, dict), f"about must be a JSON object, got {text[:40]!r}")
        known = {item.name for item in fields(TraceFacts)}
        return TraceFacts(**{name: value for name, value in values.items() if name in known})


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Loads of consecutive steps.

    Attributes:
        count: int32 [step, layer, source, expert].
        first_step: number of the first one, from 1.
        layers: indices of the MoE layers.
        facts: what else is known.

    Raises:
        ValueError: other dimensions, nothing counted, a negative count, or facts that do not fit. No file is named.
    """

    count: NDArray[np.int32]
    first_step: int
    layers: tuple[int, ...]
    facts: TraceFacts

    def __post_init__(self) -> None:
        require(
            self.count.ndim == 4 and np.issubdtype(self.count.dtype, np.integer),
            "count must be whole numbers of [step, layer, source, expert], got "
            f"{self.count.dtype} {list(self.count.shape)}",
        )
        require(
            self.count.size > 0, f"count must have steps, layers, sources and experts, got {list(self.count.shape)}"
        )
        require(
            int(self.count.min()) >= 0,
            f"count must be at least 0, got {int(self.count.min())} at [step, layer, source, expert] = "
            f"{[int(at) for at in np.unravel_index(int(self.count.argmin()), self.count.shape)]}",
        )
        require(
            len(self.layers) == self.count.shape[1],
            f"layer must name the {self.count.shape[1]} layers of count, got {len(self.layers)}",
        )
        require_divides("groups_per_node", self.facts.groups_per_node, "the number of sources", self.num_sources)

    @property
    def num_steps(self) -> int:
        """Steps that were recorded."""
        return int(self.count.shape[0])

    @property
    def num_sources(self) -> int:
        """Groups of ranks whose tokens were counted."""
        return int(self.count.shape[2])

    @property
    def num_experts(self) -> int:
        """E."""
        return int(self.count.shape[3])

    @property
    def last_step(self) -> int:
        """Number of the last one."""
        return self.first_step + self.num_steps - 1

    def until(self, step: int) -> "Trace":
        """What came up to and with ``step``, which is not before the first one."""
        return Trace(self.count[: step - self.first_step + 1], self.first_step, self.layers, self.facts)

    def to_bytes(self) -> bytes:
        """As a file."""
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            count=self.count,
            step=np.arange(self.first_step, self.last_step + 1, dtype=np.int64),
            layer=np.array(self.layers, dtype=np.int32),
            about=np.array(self.facts.to_text()),
        )
        return buffer.getvalue()

    def save(self, path: Path) -> None:
        """Write it whole or not at all."""
        write_whole(path, self.to_bytes())

    @staticmethod
    def load(path: Path, *, num_experts: int | None = None) -> "Trace":
        """Read a file, or a folder of pieces.

        Args:
            path: of either; a run's folder stands for the trace in it.
            num_experts: that it must have; None: any.

        Raises:
            ValueError: there is none, or what is there is no trace, has a gap, or has other experts.
        """
        loaded = _joined(path, _pieces_at(path)) if path.is_dir() else read_piece(path)
        require(
            num_experts in (None, loaded.num_experts),
            f"trace {path} must be of {num_experts} experts, got {loaded.num_experts}; name the trace of a run with as "
            "many",
        )
        return loaded


def piece_path(folder: Path, first_step: int) -> Path:
    """Where the piece that begins with ``first_step`` lies."""
    return folder / f"loads-{first_step:08d}.npz"


def pieces(folder: Path) -> list[Path]:
    """Files that are called like pieces, in the order of their steps."""
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if PIECE.fullmatch(path.name)]
    return sorted(named, key=lambda path: (len(path.name), path.name))


def is_runs_piece(path: Path) -> bool:
    """Whether a run wrote this piece, be it lost: a machine that stopped may leave its name alone.

    Values in it are not looked at.
    """
    if path.is_file() and path.stat().st_size == 0:
        return True
    try:
        about = json.loads(str(_arrays(path, ("about",))["about"]))
    except _UNREADABLE:
        return False
    return isinstance(about, dict) and about.get("format") == FORMAT


def read_piece(path: Path) -> Trace:
    """One file.

    Raises:
        ValueError: it is not there, no trace, or has a gap.
    """
    cure = "name a trace that `moetrain train --placement.trace true` has written, or one like it"
    require(path.is_file(), f"trace {path} is not there; {cure}")
    try:
        arrays = _arrays(path, ARRAYS)
    except _UNREADABLE as error:
        raise ValueError(f"trace {path} must be an .npz file of arrays ({error}); {cure}") from error
    require("count" in arrays, f"trace {path} must have an array count, got {sorted(arrays) or 'others'}; {cure}")
    try:
        return _trace_of(arrays)
    except (ValueError, TypeError) as error:
        raise ValueError(f"trace {path}: {error}; {cure}") from error


def _arrays(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Those of a file's arrays that have one of these names; numpy alone would leave a file open that is no archive."""
    with path.open("rb") as file:
        require(zipfile.is_zipfile(file), "it is no archive")
        file.seek(0)
        loaded = np.load(file, allow_pickle=False)
        return {name: loaded[name] for name in loaded.files if name in names}


def _trace_of(arrays: Mapping[str, NDArray[Any]]) -> Trace:
    count = arrays["count"]
    num_steps, num_layers = (*count.shape, 0, 0)[:2]
    step = arrays.get("step", np.arange(1, num_steps + 1))
    layer = arrays.get("layer", np.arange(num_layers))
    facts = TraceFacts.from_text(str(arrays["about"])) if "about" in arrays else TraceFacts()
    require(
        step.shape == (num_steps,), f"step must number the {num_steps} steps of count, got {list(step.shape)} numbers"
    )
    behind = np.flatnonzero(np.diff(step) != 1)
    require(
        len(behind) == 0,
        f"steps must follow one another, but {_after(step, behind)}: plans look one step ahead, so a trace has no gap",
    )
    narrow = count.astype(np.int32) if np.issubdtype(count.dtype, np.integer) else count
    require(bool((narrow == count).all()), "count must fit int32")
    return Trace(narrow, int(step[0]) if num_steps else 1, tuple(layer.tolist()), facts)


def _after(step: NDArray[Any], behind: NDArray[Any]) -> str:
    return f"after {step[behind[0]]} comes {step[behind[0] + 1]}" if len(behind) else ""


def _pieces_at(folder: Path) -> list[Path]:
    found = pieces(folder) or pieces(folder / "trace")
    require(
        bool(found),
        f"trace {folder} must be a file, or a folder with pieces of a trace, and has none; train with "
        "--placement.trace true",
    )
    return found


def _joined(folder: Path, paths: Sequence[Path]) -> Trace:
    parts = [read_piece(path) for path in paths]
    for before, after, path in zip(parts, parts[1:], paths[1:], strict=False):
        require(
            after.first_step == before.last_step + 1,
            f"trace {folder}: steps must follow one another, but {path.name} begins at step {after.first_step}, and "
            f"{before.last_step} is the last one before it; name the pieces before or from it on, one at a time",
        )
        sizes = [
            (part.layers, part.num_sources, part.facts.groups_per_node, part.num_experts) for part in (before, after)
        ]
        require(
            sizes[0] == sizes[1],
            f"trace {folder}: layers, sources, groups of a node and experts must stay the same, but they are "
            f"{sizes[1]} from step {after.first_step} on and {sizes[0]} before; the run went on with another mesh: "
            "name a file of the folder",
        )
    return Trace(np.concatenate([part.count for part in parts]), parts[0].first_step, parts[0].layers, parts[-1].facts)
