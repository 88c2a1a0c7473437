"""Which foldings and settings `moetrain verify` is tried on: a small covering array of the full product.

A folding is (ranks, dp_shard, dp_replicate, tp, edp, ep, etp). With every size of every axis a value of its own, each
pair of an attention and an expert axis at 8 ranks needs cases of its own ((8, 8), (8, 4), (4, 8), (4, 4) for nine
pairs of axes), and as many again at 6: at least 72 cases. The covering array therefore tells three levels of an axis
apart, 1, 2 and more; what is left of its 40 cases goes to pairs of sizes that it has not met.
"""

from collections.abc import Iterator, Sequence
from itertools import product

from moetrain.verify.product.cases import SETTINGS, Case, foldings
from moetrain.verify.spec import VerifySpec

NUM_CASES = 40


def pairs(values: Sequence[object]) -> set[tuple[int, object, int, object]]:
    """What one case shows of any two places."""
    return {(i, values[i], j, values[j]) for i in range(len(values)) for j in range(i + 1, len(values))}


def levels(folding: Sequence[int]) -> tuple[int, ...]:
    """Ranks as they are, sizes of axes as 1, 2 or 3 for more."""
    return (folding[0], *(min(size, 3) for size in folding[1:]))


def wanted_pairs() -> set[tuple[int, object, int, object]]:
    """All pairs that some case has."""
    settings = list(product(*SETTINGS.values()))
    found: set[tuple[int, object, int, object]] = set()
    for folding in {levels(folding) for folding in foldings()}:
        for setting in settings:
            found |= pairs((*folding, *setting))
    return found


def covering() -> list[Case]:
    """``NUM_CASES`` cases (folding, then settings) with every pair of levels and settings; always the same ones."""
    wanted, unseen = wanted_pairs(), {pair for folding in foldings() for pair in pairs(folding)}
    cases: list[Case] = []
    while wanted or len(cases) < NUM_CASES:
        best: tuple[tuple[int, int], Case, Case] | None = None
        for folding in foldings():
            values: list[object] = list(levels(folding))
            for index, choices in enumerate(SETTINGS.values()):
                place = len(folding) + index
                chosen = [sum((i, value, place, one) in wanted for i, value in enumerate(values)) for one in choices]
                gains = [gain + ((len(cases) + index) % len(choices) == at) / 2 for at, gain in enumerate(chosen)]
                values.append(choices[gains.index(max(gains))])
            gain = (len(pairs(values) & wanted), len(pairs(folding) & unseen))
            if best is None or gain > best[0]:
                best = (gain, tuple(values), (*folding, *values[len(folding) :]))
        assert best is not None
        wanted -= pairs(best[1])
        unseen -= pairs(best[2][:7])
        cases.append(best[2])
    return cases


def mutations_of(spec: VerifySpec) -> Iterator[str]:
    """Every fault that can be put into a case."""
    mesh = spec.run.mesh
    yield "scale-weight"
    if spec.num_lanes > 1:
        yield "wrong-group"
    if (mesh.edp or 1) > 1:
        yield from ("drop-holder", "average")
    if mesh.tp > 1:
        yield from ("skip-tp-sum", "skip-tp-gather")
    if mesh.etp > 1:
        yield "drop-etp-shard"
