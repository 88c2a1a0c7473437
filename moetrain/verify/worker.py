"""One rank of the parallel run: it takes every step the oracle took, and measures how far it ends up from it."""

import gc
import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.train.engine import Engine, StepReport
from moetrain.verify.batches import packed_batch, plan_rows
from moetrain.verify.errors import StepErrors, relative_error, scalar_error
from moetrain.verify.expected import load_expected
from moetrain.verify.mutations import create_groups, inject
from moetrain.verify.pool import Case, Place
from moetrain.verify.shards import HeldPart, errors_of_parts, held_parts, lost_names
from moetrain.verify.spec import MICRO_BATCH, SEQ_LEN, VerifySpec


def serve(place: Place, pipe: Connection) -> None:
    """Join the process group, then answer cases until the pipe closes or a case fails."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=place.timeout_s)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{place.store}", rank=place.rank, world_size=place.ranks, timeout=timeout
        )
        gc.freeze()  # modules, which no later collection need look at
        pipe.send(None)
        while (cases := _next(pipe)) is not None:
            pipe.send(run_cases(cases, timeout=timeout))
            # Engines are cycles of references that hold process groups, and each group's threads wake 100 times a
            # second; by itself the collector comes after hundreds of groups, when a case takes several times as long.
            gc.collect()
        dist.destroy_process_group()
    except Exception:
        pipe.send(traceback.format_exc(limit=-6))
    finally:
        pipe.close()


def _next(pipe: Connection) -> Sequence[Case] | None:
    try:
        return pipe.recv()
    except EOFError:
        return None


def run_cases(cases: Sequence[Case], *, timeout: timedelta) -> list[list[StepErrors]]:
    """All steps of each case, each from the oracle's parameters. Collective.

    Args:
        cases: of one mesh and mutation; neighbours that differ in batches alone share an engine.
        timeout: of each collective.
    """
    first = cases[0][0]
    groups = create_groups(FoldedMesh.from_config(first.mesh_config(), first.ranks), first.mutate, timeout)
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
        self.engine = Engine(spec.run_config(), groups, "cpu")
        inject(spec.mutate, self.engine)
        self.parts = held_parts(self.engine)
        self.lost = lost_names(self.parts, dict(zip(expected["names"], expected["shapes"], strict=True)))

    def fits(self, spec: VerifySpec) -> bool:
        """Whether the engine can run this case as well; the moments of AdamW are of one case alone."""
        alike = replace(spec, accumulation=self.spec.accumulation, rows=self.spec.rows)
        return alike == self.spec and spec.optimizer == "sgd"

    def run(self, spec: VerifySpec, expected: Sequence[Mapping[str, Any]]) -> list[StepErrors]:
        """All steps of one case."""
        self.engine.num_steps_done = 0
        start = expected[0]
        self.engine.balance.load_state_dict(
            {"lagged_count_LE": start["lagged_count_LE"], "bias_LE": start["lagged_bias_LE"]}
        )
        return [self._step(spec, step) for step in expected]

    def _step(self, spec: VerifySpec, expected: Mapping[str, Any]) -> StepErrors:
        engine = self.engine
        engine.load_parameters(expected["before"])
        rows = {row.id: row for row in expected["rows"]}
        plan = plan_rows(list(rows.values()), spec.num_lanes, MICRO_BATCH)
        rank = engine.groups.group_rank("data")
        batches = [packed_batch(plan, rows, rank, round_idx, SEQ_LEN) for round_idx in range(plan.num_rounds)]
        report = engine.step(plan, batches)
        return self._measure(report, expected)

    def _measure(self, report: StepReport, expected: Mapping[str, Any]) -> StepErrors:
        """Compare what this rank has after a step with the oracle."""
        balance = self.engine.balance.state_dict()
        wrong_LE = balance["lagged_count_LE"].cpu() != expected["count_LE"]
        known = [part for part in self.parts if part.name in expected["grads"]]
        lost = dict.fromkeys(self.lost, math.inf)
        grads = errors_of_parts(known, HeldPart.gradient, expected["grads"], expected["scale_of_grads"])
        params = errors_of_parts(known, HeldPart.parameter, expected["after"], expected["scale_of_after"])
        return StepErrors(
            loss=scalar_error(report.loss + report.aux, expected["loss"]),
            aux=scalar_error(report.aux, expected["aux"]),
            grad_norm=scalar_error(report.grad_norm, expected["grad_norm"]),
            grads=grads | lost,
            params=params | lost if expected["compare_params"] else {},
            bias=relative_error(balance["bias_LE"].cpu(), expected["bias_LE"], 0.0),
            wrong_counts=int(wrong_LE.sum()),
        )
