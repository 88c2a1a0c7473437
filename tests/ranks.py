"""Run a function on W local gloo ranks that live as long as the suite; a warning in a rank is an error.

from ranks import run_on_ranks

def body(rank: int, x: int) -> int:      # at module level; runs with an initialised default gloo group
    ...

def test_it() -> None:
    assert run_on_ranks(4, body, 3) == [...]
"""

import atexit
import functools
from collections.abc import Callable
from typing import Any

from moetrain.testing.ranks import RankPools


def run_on_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """Call ``fn(rank, *args)`` on every rank; return the results in rank order. See ``RankPools.run``."""
    return _pools().run(world_size, fn, *args, timeout=timeout)


@functools.cache
def _pools() -> RankPools:
    pools = RankPools(strict=True)
    atexit.register(pools.close)
    return pools
