"""Where experts live from step to step."""

from dataclasses import dataclass
from typing import Literal

from moetrain.config.errors import require
from moetrain.config.fields import check_fields, setting

Planner = Literal["static", "full", "random", "hecate", "moetrain"]
PlanEvery = Literal["step", "micro_batch"]
Predictor = Literal["ema", "mean"]
Rematerialise = Literal["keep", "always", "auto"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementConfig:
    """Who owns experts, and who holds replicas of hot ones."""

    planner: Planner = setting(
        "static",
        "Who holds which expert: static for expert parallelism as the mesh says, full for everyone all of them, hecate "
        "or moetrain for replicas of hot ones, planned from predicted loads, random for tests; all but static let edp "
        "and ep be one pool.",
    )
    slots: int = setting(
        2,
        "Replicas that a rank may hold of each layer's experts beside those it owns, where they move; at most "
        "moe.num_experts.",
        unit="experts",
        least=0,
    )
    plan_every: PlanEvery = setting("step", "When holders change: with each step, or with each of its micro-batches.")
    predictor: Predictor = setting(
        "ema", "What loads are expected to be: an exponential mean that is nearly the last, or the mean of five."
    )
    calibrate: bool = setting(
        False, "Plan a layer again after its router has run, where true loads make up for weights that nothing hides."
    )
    rematerialise: Rematerialise = setting(
        "keep",
        "Between forward and backward pass: keep replicas, give them back and gather them again, or as memory allows.",
    )
    move_owners_every: int = setting(
        0, "Steps after which experts may get other owners, where that pays; 0 is never.", unit="steps", least=0
    )
    trace: bool = setting(False, "Write the loads of every step and layer into the run's folder, for later study.")

    def __post_init__(self) -> None:
        check_fields(self, "placement")
        require(
            self.planner != "static" or self.move_owners_every == 0,
            f"placement.move_owners_every ({self.move_owners_every}) needs experts that may move; set "
            "placement.planner to moetrain, or placement.move_owners_every to 0",
        )
        require(
            not self.calibrate or self.planner in ("hecate", "moetrain"),
            f"placement.calibrate needs a planner that looks at loads, got placement.planner {self.planner!r}; set "
            "it to moetrain, or placement.calibrate to false",
        )

    @property
    def moves(self) -> bool:
        """Whether holders may change from step to step: rows then move over the whole pool of one etp coordinate."""
        return self.planner != "static"
