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
        moves_owners: whether it needs owners that move.
        applies: whether a run, its mesh resolved, has what it breaks.
        needs: that in words, with what the run has instead, and the cure.
    """

    name: str
    breaks: str
    applies: Callable[[RunConfig], bool] = lambda run: True
    needs: Callable[[RunConfig], str] = lambda run: "nothing"
    moves_owners: bool = False

    def require_applies(self, run: RunConfig, moves_owners: bool) -> None:
        """Raise ``ValueError`` where the fault would break nothing."""
        require(self.applies(run), f"--mutate {self.name} needs {self.needs(run)}")
        needs = f"--mutate {self.name} needs owners that move; use --move-owners"
        require(moves_owners or not self.moves_owners, needs)


def _has_replicas(run: RunConfig) -> bool:
    placement = run.placement
    if placement.moves:
        return _num_groups(run) > 1 and (placement.slots > 0 or placement.planner == "full")
    return (run.mesh.edp or 1) > 1


def _needs_replicas(run: RunConfig) -> str:
    if run.placement.moves:
        return "an expert with more than one holder, but there is one rank, or --slots is 0; use --ranks 4 --slots 2"
    return f"an expert with more than one holder, but edp is {run.mesh.edp}; choose ep smaller than the number of ranks"


def _has_moving_seats(run: RunConfig) -> bool:
    return run.placement.planner in ("random", "hecate", "moetrain") and _has_replicas(run)


def _needs_moving_seats(run: RunConfig) -> str:
    return (
        f"replicas that are planned, but --placement is {run.placement.planner} and --slots {run.placement.slots}; use "
        "--ranks 4 --placement moetrain --slots 2"
    )


def _num_groups(run: RunConfig) -> int:
    return (run.mesh.edp or 1) * (run.mesh.ep or 1)


def _moves(run: RunConfig) -> bool:
    return run.placement.moves and _num_groups(run) > 1


def _needs_to_move(run: RunConfig) -> str:
    return (
        f"experts that may move, but --placement is {run.placement.planner} on {_num_groups(run)} rank(s); use "
        "--ranks 4 --placement moetrain --move-owners"
    )


def _has_moments(run: RunConfig) -> bool:
    return _moves(run) and run.optim.name == "adamw" and run.train.steps > 4


def _needs_moments(run: RunConfig) -> str:
    return f"moments that move, but --optimizer is {run.optim.name}; use --optimizer adamw --steps 3 --move-owners"


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
    ranks = run.mesh.ep * (run.mesh.edp or 1) if run.placement.moves else run.mesh.ep
    return run.dispatch.rounding != "none" and ranks > 1


def _needs_to_round_together(run: RunConfig) -> str:
    return (
        f"ranks that round together, but --rounding is {run.dispatch.rounding} and ep is {run.mesh.ep}; "
        "use --rounding nearest and ep of 2 or more"
    )


def _has_gangs(run: RunConfig) -> bool:
    lanes = run.mesh.dp_replicate * (run.mesh.dp_shard or 1) * run.mesh.cp
    return run.sequence.has_gangs and (run.mesh.cp > 1 if run.sequence.planner == "context" else lanes > 1)


def _needs_gangs(run: RunConfig) -> str:
    return (
        f"ranks that share sequences, but --sequence is {run.sequence.planner} and cp {run.mesh.cp}; use "
        "--ranks 4 --sequence moetrain"
    )


def _offloads(run: RunConfig) -> bool:
    return run.sequence.offload > 0


def _needs_to_offload(run: RunConfig) -> str:
    return f"activations on the host, but --offload is {run.sequence.offload}; use --sequence moetrain --offload 1"


def _is_planned(run: RunConfig) -> bool:
    return run.data.packing == "documents" and (_has_lanes(run) or run.mesh.cp > 1)


def _needs_a_plan(run: RunConfig) -> str:
    return "documents on several ranks, but there are rows, or one rank; use --ranks 2 --sequence moetrain"


_ALL = (
    Mutation("drop-holder", "one holder's gradient of an expert is lost", _has_replicas, _needs_replicas),
    Mutation("average", "gradients of experts are averaged over holders", _has_replicas, _needs_replicas),
    Mutation("wrong-group", "dense gradients stay on their rank", _has_lanes, _needs_lanes),
    Mutation("scale-weight", "a rank's routing weights are off by a thousandth"),
    Mutation("round-alone", "each rank rounds by its own tokens", _rounds_together, _needs_to_round_together),
    Mutation("skip-tp-sum", "gradients that a tp group shares are not summed", _has_tp, _needs_tp),
    Mutation("skip-tp-gather", "attention misses a rank's tokens", _has_tp, _needs_tp),
    Mutation("drop-seat", "a rank's pairs for one seat are lost", _has_moving_seats, _needs_moving_seats),
    Mutation("swap-owners", "two experts change places in a move", _moves, _needs_to_move, moves_owners=True),
    Mutation("lose-moment", "moments stay behind in a move", _has_moments, _needs_moments, moves_owners=True),
    Mutation("stale-plan", "a rank goes on with the plan before", _has_moving_seats, _needs_moving_seats),
    Mutation("local-lse", "a rank of a gang forgets what other ranks' keys weigh", _has_gangs, _needs_gangs),
    Mutation("drop-ring-step", "keys and values of a step of a ring are lost", _has_gangs, _needs_gangs),
    Mutation("local-positions", "a rank of a gang counts its own tokens from 0", _has_gangs, _needs_gangs),
    Mutation("swap-parts", "a rank of a gang takes its early part for the late one", _has_gangs, _needs_gangs),
    Mutation("scale-by-rank", "gradients are of the mean over ranks, not over tokens", _is_planned, _needs_a_plan),
    Mutation("stale-offload", "what waits on the host is used before it is back", _offloads, _needs_to_offload),
    Mutation("plan-differs", "a rank holds another plan of sequences", _is_planned, _needs_a_plan),
    Mutation("drop-etp-shard", "the last etp shard of each expert adds nothing", _has_etp_shards, _needs_etp_shards),
)
MUTATIONS: MappingProxyType[str, Mutation] = MappingProxyType({mutation.name: mutation for mutation in _ALL})
