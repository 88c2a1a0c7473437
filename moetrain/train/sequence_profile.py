"""What sequences cost in a run, and what that was measured of: ``profile.json`` in its folder, and in its checkpoints.

Plans follow from costs, so that a run that goes on to the bit must weigh by those that it began with.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moetrain.config import RunConfig
from moetrain.config.errors import naming, require
from moetrain.cost.sequence_costs import SequenceCosts
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.train.differences import flat_config, pairs, shortened
from moetrain.train.own_files import is_runs_profile, with_digest

KEY = "sequence_profile"  # in a checkpoint's JSON
CURE = "measure this one with --profile, or set sequence.costs to modelled"
_TABLES = ("model.", "moe.")
_FIELDS = ("mesh.tp", "mesh.ep", "mesh.etp", "train.dtype", "train.device", "train.activation_checkpoint")
_FREE = ("model.init_std",)


@dataclass(frozen=True, slots=True)
class SequenceProfile:
    """Costs, and what they are of.

    Args:
        of: fields of a run that times depend on; see ``profiled``.
        costs: milliseconds.
        worst_error: the largest relative error of the fit.
    """

    of: Mapping[str, Any]
    costs: SequenceCosts
    worst_error: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"of": dict(self.of), "costs": self.costs.to_json(), "worst_error": self.worst_error}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "SequenceProfile":
        """What ``to_json`` gave.

        Raises:
            ValueError: it is something else.
        """
        missing = [name for name in ("of", "costs", "worst_error") if name not in values]
        require(not missing, f"a profile must have {', '.join(missing)}; measure again with --profile")
        return cls(dict(values["of"]), SequenceCosts.from_json(values["costs"]), float(values["worst_error"]))

    @classmethod
    def read(cls, path: Path) -> "SequenceProfile":
        """A ``profile.json`` that a run wrote.

        Raises:
            ValueError: there is none, or it was changed since.
        """
        with naming("sequence.costs", CURE):
            require(path.is_file(), f"sequence.costs must be modelled, measured or a file, got {str(path)!r}; {CURE}")
            require(
                is_runs_profile(path),
                f"sequence.costs: {path} is no profile of a run, or was changed since it was measured; {CURE}",
            )
            return cls.from_json(json.loads(path.read_text(encoding="utf-8")))

    def text(self) -> str:
        """The file's."""
        return json.dumps(with_digest(self.to_json()), indent=1) + "\n"

    def is_of(self, run: RunConfig, mesh: FoldedMesh) -> bool:
        """Whether it was measured of such a run."""
        return not self._differences(run, mesh)

    def check(self, run: RunConfig, mesh: FoldedMesh, name: str) -> None:
        """Refuse the profile called ``name`` where it was measured of another model.

        Raises:
            ValueError: naming what differs.
        """
        differences = self._differences(run, mesh)
        require(
            not differences,
            f"sequence.costs: {name} was measured of another model or mesh ({shortened(differences)}); {CURE}",
        )

    def _differences(self, run: RunConfig, mesh: FoldedMesh) -> list[str]:
        return [f"{name} was {before!r}, is {now!r}" for name, before, now in pairs(self.of, profiled(run, mesh))]


def profiled(run: RunConfig, mesh: FoldedMesh) -> dict[str, Any]:
    """What the time of a sequence depends on, by field; axes of the mesh as they are, not as they were asked for."""
    found = flat_config(run)
    kept = {name: value for name, value in found.items() if name.startswith(_TABLES) and name not in _FREE}
    kept |= {name: found[name] for name in _FIELDS if name in found}
    return kept | {"mesh.tp": mesh.tp, "mesh.ep": mesh.ep, "mesh.etp": mesh.etp}
