"""One rank of the parallel run: it takes every step the oracle took, and measures how far it ends up from it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch

from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.train.engine import Engine, StepReport
from moetrain.train.placing import shuffled_owners
from moetrain.verify.batches import RowsOfStep
from moetrain.verify.errors import StepErrors, relative_error, scalar_error
from moetrain.verify.expected import Comparison, load_expected
from moetrain.verify.faults import create_groups, feed_type, inject
from moetrain.verify.shards import HeldShard, errors_of_shards, held_shards, lost_names
from moetrain.verify.spec import VerifySpec


def run_cases(rank: int, cases: Sequence[Comparison], timeout_s: float) -> list[list[StepErrors]]:
    """All steps of each case, each from the oracle's parameters. Collective.

    Args:
        rank: this one.
        cases: of one mesh and mutation; neighbours that differ in batches alone share an engine.
        timeout_s: of each collective.
    """
    first = cases[0][0]
    mesh = FoldedMesh.of_run(first.run, first.ranks)
    gangs = first.run.sequence.has_gangs
    groups = create_groups(mesh, first.mutate, timedelta(seconds=timeout_s), gangs=gangs)
    try:
        runner: _Runner | None = None
        errors = []
        for spec, path in cases:
            expected = load_expected(path)
            if runner is None or not runner.fits(spec):
                runner = _Runner(spec, groups, expected[0])
            errors.append(runner.run(spec, expected))
        return errors
    finally:
        groups.close()


class _Runner:
    """An engine with its fault, and what this rank has of each tensor."""

    def __init__(self, spec: VerifySpec, groups: MeshGroups, expected: Mapping[str, Any]) -> None:
        self.spec = spec
        self.engine = Engine(spec.run, groups, "cpu")
        inject(spec.mutate, self.engine)
        self.shards = held_shards(self.engine)
        self.lost = lost_names(self.shards, dict(zip(expected["names"], expected["shapes"], strict=True)))

    def fits(self, spec: VerifySpec) -> bool:
        """Whether the engine can run this case as well; the moments of AdamW are of one case alone."""
        alike = replace(spec, accumulation=self.spec.accumulation, rows=self.spec.rows)
        return alike == self.spec and spec.run.optim.name == "sgd"

    def run(self, spec: VerifySpec, expected: Sequence[Mapping[str, Any]]) -> list[StepErrors]:
        """All steps of one case."""
        self.engine.num_steps_done = 0
        start = expected[0]
        lagged = zip(self.engine.balance.layers, start["lagged_count_LE"], start["lagged_bias_LE"], strict=True)
        self.engine.balance.load_state_dict(
            {layer: {"lagged_count_E": count_E, "bias_E": bias_E} for layer, count_E, bias_E in lagged}
        )
        return [self._step(spec, step) for step in expected]

    def _step(self, spec: VerifySpec, expected: Mapping[str, Any]) -> StepErrors:
        engine = self.engine
        engine.whole.load(expected["before"])
        if spec.move_owners:
            self._move_owners(engine.num_steps_done)
        feed = feed_type(spec.mutate)(
            RowsOfStep(expected["rows"]), spec.planner(), engine.groups, engine.groups.group("world"), batch_size=1
        )
        try:
            report = engine.step(*feed.next(engine.num_steps_done, engine.num_steps_done, last=True))
        finally:
            feed.close()
        return self._measure(report, expected)

    def _move_owners(self, step: int) -> None:
        """Draw other owners; a bad move shows, as nothing is loaded after it."""
        placing = self.engine.placing
        owner_LE = shuffled_owners(placing.owners(), self.spec.seed, step)
        self.engine.take(placing.relocate(owner_LE))
        self.shards = held_shards(self.engine)

    def _measure(self, report: StepReport, expected: Mapping[str, Any]) -> StepErrors:
        """Compare what this rank has after a step with the oracle."""
        balance = self.engine.balance.state_dict().values()
        wrong_LE = torch.stack([kept["lagged_count_E"] for kept in balance]).cpu() != expected["count_LE"]
        bias_LE = torch.stack([kept["bias_E"] for kept in balance]).cpu()
        known = [shard for shard in self.shards if shard.name in expected["grads"]]
        lost = dict.fromkeys(self.lost, math.inf)
        grads = errors_of_shards(known, HeldShard.gradient, expected["grads"], expected["scale_of_grads"])
        params = errors_of_shards(known, HeldShard.parameter, expected["after"], expected["scale_of_after"])
        return StepErrors(
            loss=scalar_error(report.loss + report.aux, expected["loss"]),
            aux=scalar_error(report.aux, expected["aux"]),
            grad_norm=scalar_error(report.grad_norm, expected["grad_norm"]),
            grads=grads | lost,
            params=params | lost if expected["compare_params"] else {},
            bias=relative_error(bias_LE, expected["bias_LE"], 0.0),
            wrong_counts=int(wrong_LE.sum()),
        )
