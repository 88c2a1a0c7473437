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

from moetrain.verify.expected import expect, save_expected
from moetrain.verify.pool import RankPools, RunFailedError
from moetrain.verify.report import VerifyReport
from moetrain.verify.spec import VerifySpec


def verify(spec: VerifySpec, pools: RankPools | None = None) -> VerifyReport:
    """Compare one parallelism with the oracle.

    Args:
        spec: what to run.
        pools: processes to reuse; without them, processes are started and ended for this case alone.
    """
    if pools is None:
        with RankPools() as own:
            return verify(spec, own)
    start = time.monotonic()
    expected = expect(spec)
    path = pools.folder / "expected.pt"
    save_expected(expected, path)
    steps, error = [], None
    try:
        steps = pools.pool(spec.ranks).run(expected.spec, path)
    except RunFailedError as failure:
        error = str(failure)
    return VerifyReport(expected.spec, tuple(steps), expected.skipped_seeds, error, time.monotonic() - start)
