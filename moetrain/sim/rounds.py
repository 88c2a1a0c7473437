"""Runs a plan's collectives on simulated ranks: whether all of them come to an end, and else who waits for whom.

A rank's program is a list of communicators, in the order in which it enters them. A communicator's next use begins once
every member has come to it; a rank does nothing meanwhile. So collectives behave on a device; it is stricter than
what sends and receives between two ranks need.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from moetrain.sequence.plan import Item

Communicator = tuple[str, tuple[int, ...]]  # what it is for, and its ranks


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a run.

    Attributes:
        uses: how often communicators were used.
        waiting: of each rank that is not done, the communicator that it waits in, and how many it has used before;
            nothing where all are done.
    """

    uses: int
    waiting: Mapping[int, tuple[Communicator, int]]

    @property
    def completed(self) -> bool:
        """Whether all ranks came to an end."""
        return not self.waiting

    def told(self) -> str:
        """Who waits in what, for whom; of many ranks the first."""
        lines = []
        for rank, ((name, ranks), before) in sorted(self.waiting.items())[:4]:
            missing = [other for other in ranks if self.waiting.get(other, (None, 0))[0] != (name, ranks)]
            lines.append(f"rank {rank} waits in {name} of ranks {list(ranks)}, its use {before}, for ranks {missing}")
        return "; ".join(lines)


def run(programs: Sequence[Iterable[Communicator]]) -> Outcome:
    """Run each rank's program beside the others'."""
    left = [list(reversed(list(program))) for program in programs]
    entered: dict[Communicator, int] = defaultdict(int)
    used = [0] * len(left)
    uses = 0
    ready = list(range(len(left)))
    while ready:
        rank = ready.pop()
        if not left[rank]:
            continue
        communicator = left[rank][-1]
        entered[communicator] += 1
        if entered[communicator] < len(communicator[1]):
            continue
        entered[communicator] = 0
        uses += 1
        for member in communicator[1]:
            left[member].pop()
            used[member] += 1
            ready.append(member)
    waiting = {rank: (program[-1], used[rank]) for rank, program in enumerate(left) if program}
    return Outcome(uses, waiting)


def programs_of(
    items_of: Sequence[Sequence[Item]],
    rounds_R: Sequence[int],
    *,
    block: int,
    num_layers: int = 2,
    gathers: bool = False,
) -> list[list[Communicator]]:
    """What each rank enters in one step: layer by layer forward, and backward, in each round.

    Args:
        items_of: of each rank the items that it is in, in the order in which it runs them.
        rounds_R: rounds of each rank; in one without an item its lane is empty, and it enters what its block does.
        block: neighbouring ranks that share experts' all-to-alls.
        num_layers: each with a ring where an item is a gang's, and two all-to-alls of the block.
        gathers: each layer's parameters are gathered from all ranks first, and its gradients reduced in the last round.
    """
    world: Communicator = ("gather", tuple(range(len(rounds_R))))
    programs = []
    for rank, rounds in enumerate(rounds_R):
        first = rank // block * block
        experts: Communicator = ("all-to-all", tuple(range(first, first + block)))
        at = {item.round: item for item in items_of[rank]}
        program: list[Communicator] = []
        for round_idx in range(rounds):
            item = at.get(round_idx)
            ring: list[Communicator] = [("ring", item.ranks)] if item is not None and len(item.ranks) > 1 else []
            layer = [*([world] if gathers else []), *ring, experts, experts]
            program += layer * num_layers  # forward
            program += [*([world] if gathers else []), experts, experts, *ring] * num_layers
        programs.append(program)
    return programs
