"""Whether all ranks have one configuration, the same data, and compute in one type: asked before the first step.

Each machine reads its own options, files and dataset. Ranks that differ in them would not fail: they would add up
gradients of different runs, or wait for one another in different places.
"""

import hashlib
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moetrain.config import RunConfig
from moetrain.data.manifest import Manifest, data_facts
from moetrain.train.differences import flat_config, pairs, shortened
from moetrain.train.world import RefusedByAllError

# What a machine may have for itself: where its files are, which are compared by what is in them, and its cores.
LOCAL_FIELDS = frozenset({"data.path", "run_dir", "train.threads"})


@dataclass(frozen=True, slots=True)
class Statement:
    """What one rank is about to do, and the machine that it runs on."""

    machine: str
    config: Mapping[str, Any]  # by field, without LOCAL_FIELDS
    data: Mapping[str, Any]  # see data_facts
    dtype: str  # of compute, as "bfloat16"

    @staticmethod
    def of(run: RunConfig, manifest: Manifest, dtype: torch.dtype) -> "Statement":
        """This rank's statement.

        Args:
            run: the configuration.
            manifest: of the dataset.
            dtype: what ``run.train.dtype`` means on this rank's device.
        """
        config = {name: value for name, value in flat_config(run).items() if name not in LOCAL_FIELDS}
        return Statement(socket.gethostname(), config, data_facts(manifest), dtype_name(dtype))

    def digest(self) -> str:
        """SHA-256 of all but the machine: equal where two ranks are about to do the same."""
        text = json.dumps([dict(self.config), dict(self.data), self.dtype], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    """``"bfloat16"`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def require_agreement(mine: Statement, group: dist.ProcessGroup | None = None) -> None:
    """Go on only if every rank of ``group`` (None: the default one) states the same. Collective.

    Digests are gathered first. All ranks see the same ones, so all of them take part in what follows, or none.

    Raises:
        RefusedByAllError: some rank's statement differs from the first one's; on every rank alike.
    """
    digests = [""] * dist.get_world_size(group)
    dist.all_gather_object(digests, mine.digest(), group=group)
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        first, other = _stated_by(0, mine, group), _stated_by(others[0], mine, group)
        raise RefusedByAllError(
            f"all {len(digests)} ranks must be about to do the same, but {len(others)} of them differ from rank 0 on "
            f"{first.machine}, the first of these being rank {others[0]} on {other.machine}: "
            f"{disagreement(first, other)}"
        )


def disagreement(first: Statement, other: Statement) -> str:
    """How ``other`` differs from ``first``, rank 0's, and what to do about each kind of difference."""
    config = [_difference(name, *values) for name, *values in pairs(first.config, other.config)]
    data = [_difference(f"the dataset's {name}", *values) for name, *values in pairs(first.data, other.data)]
    dtype = []
    if first.dtype != other.dtype and first.config.get("train.dtype") == other.config.get("train.dtype"):
        dtype = [_difference("the type of compute", first.dtype, other.dtype)]
    cures = (
        (config, "give every machine the same options and the same --config file"),
        (data, "give every machine the same dataset: copy one, or name one that all share with --data.path"),
        (dtype, "set train.dtype to the type that all devices are to compute in, instead of 'auto'"),
    )
    return f"{shortened([*config, *data, *dtype])}; {'; '.join(cure for found, cure in cures if found)}"


def _difference(name: str, first: object, other: object) -> str:
    return f"{name} is {other!r}, against {first!r} on rank 0"


def _stated_by(rank: int, mine: Statement, group: dist.ProcessGroup | None) -> Statement:
    stated = [mine]
    dist.broadcast_object_list(stated, group=group, group_src=rank)
    return stated[0]
