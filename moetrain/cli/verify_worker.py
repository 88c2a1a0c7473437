"""One rank of the parallel run: it takes every step the oracle took, and measures how far it ends up from it."""

import traceback
from collections.abc import Mapping
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.cli.verify_batches import Row, packed_batch, plan_rows
from moetrain.cli.verify_mutations import create_groups, inject
from moetrain.cli.verify_pool import Place
from moetrain.cli.verify_report import StepErrors, relative_error, relative_errors, scalar_error
from moetrain.cli.verify_spec import MICRO_BATCH, SEQ_LEN, VerifySpec
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.train.engine import Engine, StepReport


def serve(place: Place, pipe: Connection) -> None:
    """Join the process group, then answer cases until the pipe closes or a case fails."""
    torch.set_num_threads(1)
    timeout = timedelta(seconds=place.timeout_s)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{place.store}", rank=place.rank, world_size=place.ranks, timeout=timeout
        )
        pipe.send(None)
        while (case := _next(pipe)) is not None:
            pipe.send(run_case(*case, timeout=timeout))
        dist.destroy_process_group()
    except Exception:
        pipe.send(traceback.format_exc(limit=-6))
    finally:
        pipe.close()


def _next(pipe: Connection) -> tuple[VerifySpec, Path] | None:
    try:
        return pipe.recv()
    except EOFError:
        return None


def run_case(spec: VerifySpec, expected_path: Path, *, timeout: timedelta) -> list[StepErrors]:
    """All steps of one case, each from the oracle's parameters. Collective.

    Args:
        spec: the case, with the seed that was used.
        expected_path: what ``save_expected`` wrote.
        timeout: of each collective.
    """
    run = spec.run_config()
    groups = create_groups(FoldedMesh.from_config(run.mesh, spec.ranks), spec.mutate, timeout)
    try:
        engine = Engine(run, groups, "cpu")
        inject(spec.mutate, engine)
        return [_step(engine, spec, step) for step in torch.load(expected_path, weights_only=True)]
    finally:
        groups.close()


def _step(engine: Engine, spec: VerifySpec, expected: Mapping[str, Any]) -> StepErrors:
    engine.load_parameters(expected["before"])
    rows = {row_id: Row(row_id, *matrix_4S) for row_id, matrix_4S in expected["rows"].items()}
    plan = plan_rows(list(rows.values()), spec.num_lanes, MICRO_BATCH)
    rank = engine.groups.group_rank("data")
    batches = [packed_batch(plan, rows, rank, round_idx, SEQ_LEN) for round_idx in range(plan.num_rounds)]
    report = engine.step(plan, batches)
    return measure(report, engine.gradients(), engine.parameters(), engine.balance.state_dict(), expected)


def measure(
    report: StepReport,
    grads: Mapping[str, Tensor],
    params: Mapping[str, Tensor],
    balance: Mapping[str, Tensor],
    expected: Mapping[str, Any],
) -> StepErrors:
    """Compare what one rank has after a step with the oracle."""
    right_counts_LE = expected["count_LE"]
    wrong_LE = balance["lagged_count_LE"].cpu() != right_counts_LE
    return StepErrors(
        loss=scalar_error(report.loss + report.aux, expected["loss"]),
        aux=scalar_error(report.aux, expected["aux"]),
        grad_norm=scalar_error(report.grad_norm, expected["grad_norm"]),
        grads=relative_errors(grads, expected["grads"]),
        params=relative_errors(params, expected["after"]) if expected["compare_params"] else {},
        bias=relative_error(balance["bias_LE"].cpu(), expected["bias_LE"], 0.0),
        wrong_counts=int(wrong_LE.sum()),
    )
