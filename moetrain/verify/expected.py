"""What the oracle says the parallel run must produce, from parameters that both start each step with.

Shapes: L MoE layers, E experts, P elements of all parameters, T tokens of all rows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain.config import RunConfig
from moetrain.oracle import BalanceInputs, OracleStep, OracleTrainer, random_parameters
from moetrain.verify.batches import Row, Rows, oracle_batches
from moetrain.verify.errors import scales_of
from moetrain.verify.spec import VerifySpec

Comparison = tuple[VerifySpec, Path]  # with the seed that was used; what ``save_expected`` wrote for it
NARROWEST_GAP = {"float32": 1e-6, "float64": 1e-12}
MOST_SEEDS = 50
MOST_LOAD = 40  # of an expert, where a run starts from drawn loads
MOST_MOVES = 2  # of a selection bias, likewise


@dataclass(frozen=True, slots=True)
class ExpectedStep:
    """One step as the oracle took it."""

    rows: Sequence[Row]
    balance: BalanceInputs  # both runs start the step with
    before: dict[str, Tensor]  # parameters both runs start the step with, in the dtype of the parallel run
    oracle: OracleStep
    bias_LE: Tensor  # selection biases after the step
    compare_params: bool


@dataclass(frozen=True, slots=True)
class Expected:
    """All steps, and the seeds that were passed over because a routing decision was too close to call."""

    spec: VerifySpec  # with the seed that was used
    steps: tuple[ExpectedStep, ...]
    skipped_seeds: tuple[int, ...]


def expect(spec: VerifySpec) -> Expected:
    """Run the oracle on the first seed from ``spec.seed`` on whose routing decisions no rounding can change.

    The oracle computes in float64 whatever the dtype of the parallel run, so that the error is that run's own.
    """
    skipped: list[int] = []
    for seed in range(spec.seed, spec.seed + MOST_SEEDS):
        steps = _run(spec.with_seed(seed))
        if steps is not None:
            return Expected(spec.with_seed(seed), tuple(steps), tuple(skipped))
        skipped.append(seed)
    raise ValueError(
        f"each of the {MOST_SEEDS} seeds from {spec.seed} on has a routing decision closer than "
        f"{NARROWEST_GAP[spec.dtype]}, which rounding could turn; use --dtype float64 or fewer --steps, and where "
        "tokens are dropped or rounded by weight, more experts and top_k above 1, so that weights differ"
    )


def _run(spec: VerifySpec) -> list[ExpectedStep] | None:
    """All steps; None as soon as one has a decision that rounding could turn."""
    run = spec.run
    dtype = torch.float64 if spec.dtype == "float64" else torch.float32
    params = random_parameters(run.model, run.moe, seed=spec.seed, dtype=torch.float64)
    trainer = OracleTrainer(params, run)
    if spec.num_steps == 1:
        trainer.balance = _drawn_balance(run)
    steps = []
    for step in range(spec.num_steps):
        before = {name: value.to(dtype) for name, value in trainer.params.items()}
        trainer.params = {name: value.to(torch.float64) for name, value in before.items()}
        balance = trainer.balance
        rows = spec.rows_of(step)
        taken = trainer.step(oracle_batches(spec.plan(rows), Rows(rows), spec.domains()))
        if taken.gap < NARROWEST_GAP[spec.dtype]:
            return None
        bias_LE = _stacked(trainer.balance.bias_E)
        # Moments carry rounding of float32 from step to step, which a small second moment makes large.
        compare_params = run.optim.name == "sgd" or step == 0 or spec.dtype == "float64"
        steps.append(ExpectedStep(rows, balance, before, taken, bias_LE, compare_params))
    return steps


def _drawn_balance(run: RunConfig) -> BalanceInputs:
    """What earlier steps might have left: without any loads, the balance loss of a first step has no gradient."""
    generator = torch.Generator().manual_seed(run.seed)
    layers, num_experts = run.model.moe_layers, run.moe.num_experts

    def draw(low: int, high: int) -> dict[int, Tensor]:
        return {layer: torch.randint(low, high, (num_experts,), generator=generator) for layer in layers}

    moves_E = draw(-MOST_MOVES, MOST_MOVES + 1)
    rate = run.balance.bias_rate if run.balance.loss_free else 0.0
    # Rounded as a parallel run in float32 has them, whatever its type.
    bias_E = {layer: (rate * moves.float()).double() for layer, moves in moves_E.items()}
    return BalanceInputs(draw(0, MOST_LOAD), bias_E)


def save_expected(expected: Expected, path: Path) -> None:
    """Write what every rank compares itself with: few and flat tensors, so that many ranks read it at little cost."""
    path.unlink(missing_ok=True)  # a rank may still have the old file in its memory
    torch.save([_packed(step) for step in expected.steps], path)


def _packed(step: ExpectedStep) -> dict[str, Any]:
    oracle, names = step.oracle, sorted(step.oracle.grads)
    return {
        "row_ids": [row.id for row in step.rows],
        "row_2T": torch.cat([torch.stack((row.token_id_T, row.target_T)) for row in step.rows], dim=1),
        "borders": [row.borders for row in step.rows],
        "names": names,
        "shapes": [tuple(oracle.grads[name].shape) for name in names],
        "before": torch.cat([step.before[name].flatten() for name in names]),
        "after": torch.cat([oracle.params[name].flatten() for name in names]),
        "grads": torch.cat([oracle.grads[name].flatten() for name in names]),
        "scale_of_after": scales_of(oracle.params),
        "scale_of_grads": scales_of(oracle.grads),
        "loss": oracle.loss,
        "aux": oracle.aux,
        "grad_norm": oracle.grad_norm,
        "lagged_count_LE": _stacked(step.balance.lagged_count_E),
        "lagged_bias_LE": _stacked(step.balance.bias_E),
        "count_LE": _stacked(oracle.count_E),
        "bias_LE": step.bias_LE,
        "compare_params": step.compare_params,
    }


def load_expected(path: Path) -> list[dict[str, Any]]:
    """The steps that ``save_expected`` wrote; whole tensors by name under "before", "after" and "grads"."""
    steps: list[dict[str, Any]] = torch.load(path, weights_only=True, mmap=True)
    for step in steps:
        for kind in ("before", "after", "grads"):
            step[kind] = _unpacked(step["names"], step["shapes"], step[kind])
        tensors = step["row_2T"].split([borders[-1] for borders in step["borders"]], dim=1)
        step["rows"] = [
            Row(row_id, row_2T[0], row_2T[1], borders)
            for row_id, row_2T, borders in zip(step["row_ids"], tensors, step["borders"], strict=True)
        ]
    return steps


def _unpacked(names: Sequence[str], shapes: Sequence[tuple[int, ...]], flat_P: Tensor) -> dict[str, Tensor]:
    parts = flat_P.split([math.prod(shape) for shape in shapes])
    return {name: part.view(shape) for name, shape, part in zip(names, shapes, parts, strict=True)}


def _stacked(of_layer: Mapping[int, Tensor]) -> Tensor:
    return torch.stack([of_layer[layer] for layer in sorted(of_layer)])
