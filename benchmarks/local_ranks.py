"""Processes of this machine as the ranks of a benchmark, and what each of them found."""

import json
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE_S = 300.0  # of a collective


def on_local_ranks(world: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    """What ``body(rank, *args)`` gave, as JSON, in each of ``world`` new processes with a thread each, over gloo.

    ``body`` is at the top level of its module; an initialised default group has all ranks.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (world, folder, body, args), nprocs=world)
        return [json.loads(Path(folder, str(rank)).read_text()) for rank in range(world)]


def _process(rank: int, world: int, folder: str, body: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=PATIENCE_S)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=limit)
    Path(folder, str(rank)).write_text(json.dumps(body(rank, *args)))
    dist.destroy_process_group()
