"""Faults that can be asked for by name, each with what it needs; ``faults`` puts them into an engine."""

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

from moetrain.config import RunConfig
from moetrain.config.errors import require


@dataclass(frozen=True, slots=True)
class Mutation:
    """One fault.

    Attributes:
        name: as in ``--mutate NAME``.
        breaks: what it does, in a few words.
        applies: whether a run, its mesh resolved, has what it breaks.
        needs: that in words, with what the run has instead, and the cure.
    """

    name: str
    breaks: str
    applies: Callable[[RunConfig], bool] = lambda run: True
    needs: Callable[[RunConfig], str] = lambda run: "nothing"

    def require_applies(self, run: RunConfig) -> None:
        """Raise ``ValueError`` where the fault would break nothing."""
        require(self.applies(run), f"--mutate {self.name} needs {self.needs(run)}")


def _has_replicas(run: RunConfig) -> bool:
    return (run.mesh.edp or 1) > 1


def _needs_replicas(run: RunConfig) -> str:
    return f"an expert with more than one holder, but edp is {run.mesh.edp}; choose ep smaller than the number of ranks"


def _has_lanes(run: RunConfig) -> bool:
    return run.mesh.dp_replicate * (run.mesh.dp_shard or 1) > 1


def _needs_lanes(run: RunConfig) -> str:
    return "ranks that see different rows, but dp is 1; use --ranks 2 --mesh dp=2"


def _has_tp(run: RunConfig) -> bool:
    return run.mesh.tp > 1


def _needs_tp(run: RunConfig) -> str:
    return "tensor parallelism, but tp is 1; use --ranks 2 --mesh tp=2"


def _has_etp_shards(run: RunConfig) -> bool:
    return run.mesh.etp > 1


def _needs_etp_shards(run: RunConfig) -> str:
    return "experts in shards, but etp is 1; use --ranks 2 --experts etp=2"


def _rounds_together(run: RunConfig) -> bool:
    return run.dispatch.rounding != "none" and run.mesh.ep > 1


def _needs_to_round_together(run: RunConfig) -> str:
    return (
        f"ranks that round together, but --rounding is {run.dispatch.rounding} and ep is {run.mesh.ep}; "
        "use --rounding nearest and ep of 2 or more"
    )


_ALL = (
    Mutation("drop-holder", "one holder's gradient of an expert is lost", _has_replicas, _needs_replicas),
    Mutation("average", "gradients of experts are averaged over holders", _has_replicas, _needs_replicas),
    Mutation("wrong-group", "dense gradients stay on their rank", _has_lanes, _needs_lanes),
    Mutation("scale-weight", "a rank's routing weights are off by a thousandth"),
    Mutation("round-alone", "each rank rounds by its own tokens", _rounds_together, _needs_to_round_together),
    Mutation("skip-tp-sum", "gradients that a tp group shares are not summed", _has_tp, _needs_tp),
    Mutation("skip-tp-gather", "attention misses a rank's tokens", _has_tp, _needs_tp),
    Mutation("drop-etp-shard", "the last etp shard of each expert adds nothing", _has_etp_shards, _needs_etp_shards),
)
MUTATIONS: MappingProxyType[str, Mutation] = MappingProxyType({mutation.name: mutation for mutation in _ALL})
