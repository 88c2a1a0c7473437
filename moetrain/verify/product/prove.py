"""Goes through the full product of foldings and settings, in shards and as many sittings as it takes.

Each case is one step, compared like any other case of `moetrain verify`, from drawn expert loads and selection biases.
What makes it bearable: what the oracle says is computed once for all foldings that have as many lanes, cases that
differ in batches alone share an engine, and no tensor is gathered.

A case that fails is written down with its error, and the run goes on with fresh processes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from moetrain.testing.ranks import RankPools
from moetrain.verify.compare import RunFailedError, measure
from moetrain.verify.expected import Comparison, expect, save_expected
from moetrain.verify.product.cases import Unit, case_id
from moetrain.verify.product.progress import Outcome, Progress
from moetrain.verify.report import VerifyReport
from moetrain.verify.spec import VerifySpec

ANNOUNCE_EVERY_S = 30.0


@dataclass(slots=True)
class Expectations:
    """What the oracle said, in files: of a setting, it is the same for all foldings with as many lanes."""

    folder: Path
    _known: dict[tuple[object, ...], Comparison] = field(default_factory=dict)

    def of(self, spec: VerifySpec) -> Comparison:
        """The comparison with the seed that was used, and the file that ranks compare themselves with.

        Raises:
            ValueError: no seed has decisions clear enough.
        """
        key = (spec.changed, spec.accumulation, spec.num_lanes)
        if key not in self._known:
            expected = expect(spec)
            path = self.folder / f"expected{len(self._known)}.pt"
            save_expected(expected, path)
            self._known[key] = (expected.spec, path)
        of_others, path = self._known[key]
        return spec.with_seed(of_others.seed), path

    def forget(self) -> None:
        """Remove the files."""
        for _, path in self._known.values():
            path.unlink()
        self._known.clear()


def prove(
    todo: Sequence[Unit],
    progress: Progress,
    *,
    timeout_s: float,
    deadline: float = float("inf"),
    retry: bool = False,
    announce: Callable[[str], None] = lambda line: None,
) -> bool:
    """Go through units and add what is not in ``progress`` yet.

    Args:
        todo: in order.
        progress: gets the outcome of every case.
        timeout_s: after which a silent rank ends its case.
        deadline: on the monotonic clock; no folding starts after it.
        retry: try cases again that did not finish.
        announce: gets a line now and then.

    Returns:
        Whether all units were gone through.
    """
    start, block, ranks, num_before = time.monotonic(), 0, 0, len(progress.outcomes)
    announced = start
    with RankPools(timeout_s=timeout_s) as pools:
        expectations = Expectations(pools.folder)
        for (next_block, folding), group in groupby(todo, key=lambda unit: (unit.block, unit.folding)):
            left = [unit for unit in group if not _is_known(unit, progress, retry)]
            if not left:
                continue
            if time.monotonic() > deadline:
                return False
            if next_block != block:
                expectations.forget()
            if folding[0] != ranks:
                pools.end()  # processes of one world size at a time
            block, ranks = next_block, folding[0]
            for outcome in _outcomes(left, pools, expectations):
                progress.add(outcome)
            if time.monotonic() - announced > ANNOUNCE_EVERY_S:
                announced, known = time.monotonic(), len(progress.outcomes)
                each = (announced - start) / max(1, known - num_before)
                announce(f"{known} cases, {each:.2f} s each, last {ranks} ranks")
    return True


def _is_known(unit: Unit, progress: Progress, retry: bool) -> bool:
    outcomes = [progress.outcomes.get(case_id(case)) for case in unit.cases]
    return all(outcome is not None and not (retry and outcome.error) for outcome in outcomes)


def _outcomes(of_folding: Sequence[Unit], pools: RankPools, expectations: Expectations) -> list[Outcome]:
    """Run the cases of one folding together, and where that fails each alone, to know which it was."""
    names = {spec: case_id(case) for unit in of_folding for spec, case in zip(unit.specs(), unit.cases, strict=True)}
    together = _run(names, pools, expectations)
    if len(names) == 1 or all(outcome.error is None for outcome in together):
        return together
    return [outcome for spec, name in names.items() for outcome in _run({spec: name}, pools, expectations)]


def _run(names: dict[VerifySpec, str], pools: RankPools, expectations: Expectations) -> list[Outcome]:
    start, steps, error = time.monotonic(), [], None
    used = list(names)
    try:
        cases = [expectations.of(spec) for spec in names]
        used = [spec for spec, _ in cases]
        steps = measure(cases, pools)
    except (RunFailedError, ValueError) as failure:
        error = str(failure)
    seconds = round((time.monotonic() - start) / len(used), 3)
    of_case = steps or [[] for _ in used]
    reports = [VerifyReport(spec, tuple(found), error=error) for spec, found in zip(used, of_case, strict=True)]
    return [Outcome.of(name, report, seconds) for name, report in zip(names.values(), reports, strict=True)]
