"""Prove that a parallelism computes what one process computes, before trusting a cluster to it.

A scaled-down model takes a few steps on local ranks (gloo), and the oracle takes the same steps in one process from
the same parameters. What is compared, relative to the largest element (see ``errors.relative_error``):

- the loss, its auxiliary part, each gradient, and the gradient's norm, at every step;
- the parameters after every SGD step, or after the first AdamW step (later ones depend on moments of earlier, not
  re-synchronised gradients);
- expert loads exactly, and the selection biases of loss-free balancing.

Tolerances: 1e-11 in float64, 1e-5 in float32.
"""

import time
from collections.abc import Sequence

from moetrain.testing.rank import Failure
from moetrain.testing.ranks import RankPoolError, RankPools, RankTimeoutError
from moetrain.verify.errors import StepErrors
from moetrain.verify.expected import Comparison, expect, save_expected
from moetrain.verify.report import VerifyReport
from moetrain.verify.spec import VerifySpec

RUN_CASES = "moetrain.verify.worker:run_cases"  # by name: the engine that it imports is of no use to who asks


class RunFailedError(RuntimeError):
    """The parallel run did not finish: a rank raised, died, or was not heard of in time."""


def verify(spec: VerifySpec, pools: RankPools | None = None, *, timeout_s: float = 120.0) -> VerifyReport:
    """Compare one parallelism with the oracle.

    Args:
        spec: what to run.
        pools: processes to reuse; without them, processes are started and ended for this case alone.
        timeout_s: after which a silent rank of such processes ends the run.
    """
    if pools is None:
        with RankPools(timeout_s=timeout_s) as own:
            return verify(spec, own)
    start = time.monotonic()
    pools.prepare(spec.ranks)  # the ranks start while the oracle computes
    expected = expect(spec)
    path = pools.folder / "expected.pt"
    save_expected(expected, path)
    steps, error = [], None
    try:
        (steps,) = measure([(expected.spec, path)], pools)
    except RunFailedError as failure:
        error = str(failure)
    return VerifyReport(expected.spec, tuple(steps), expected.skipped_seeds, error, time.monotonic() - start)


def measure(cases: Sequence[Comparison], pools: RankPools) -> list[list[StepErrors]]:
    """The errors of each step of several cases of one mesh and mutation, the worst over ranks.

    Raises:
        RunFailedError: naming the ranks and what they said; which case it was is not known. The next cases have fresh
            processes.
    """
    ranks = cases[0][0].ranks
    try:
        of_ranks = pools.replies(ranks, RUN_CASES, cases, pools.timeout_s)
    except RankTimeoutError as error:
        raise RunFailedError(f"{error}\nraise --timeout on a slow machine") from error
    except RankPoolError as error:
        raise RunFailedError(str(error)) from error
    failures = {rank: reply.text.strip() for rank, reply in enumerate(of_ranks) if isinstance(reply, Failure)}
    if failures:
        pools.drop(ranks, patience_s=0.0)
        told = [f"rank {rank} failed to run the case: {text}" for rank, text in failures.items()]
        raise RunFailedError("\n".join(told))
    return [
        [StepErrors.worst(list(of_step)) for of_step in zip(*of_case, strict=True)]
        for of_case in zip(*of_ranks, strict=True)
    ]
