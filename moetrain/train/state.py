"""An engine's state as a checkpoint sees it: logical tensors under logical names, and a little JSON.

Keys: a dense parameter's own name; ``layers.{l}.moe.experts.{e}.w_in`` and ``.w_out`` for each expert; the same names
after ``optim.exp_avg.`` and ``optim.exp_avg_sq.`` for moments; ``balance.*``. None of them says how many ranks
there were, so a checkpoint loads under any mesh.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from moetrain.checkpoint import Manifest
from moetrain.checkpoint.pieces import LogicalTensor, Piece
from moetrain.checkpoint.save_load import load, save
from moetrain.config.load import to_dict
from moetrain.train.agreement import dtype_name
from moetrain.train.engine import Engine
from moetrain.train.grad_norm import counts
from moetrain.train.optimizer import moments, num_updates, set_num_updates
from moetrain.train.shards import Shard, expert_name

NEXT_ROW = "next_row"  # key in a checkpoint's JSON: the packed row that the next step begins with


def save_engine(
    engine: Engine, folder: Path, group: dist.ProcessGroup | None, *, keep: int = 0, extra: dict[str, Any] | None = None
) -> Path:
    """Write a checkpoint of ``engine`` into ``folder``. Collective over ``group``, which holds all ranks."""
    state = logical_state(engine, writing=True, balance=engine.balance.state_dict())
    stored = {
        "num_updates": _agreed_updates(engine, group),
        "num_skipped": engine.num_skipped,
        "num_skipped_in_a_row": engine.num_skipped_in_a_row,
        NEXT_ROW: engine.num_steps_done * engine.run.data.global_batch,
        "world_size": engine.groups.mesh.world_size,
        "config": to_dict(engine.run),
        "dtype": dtype_name(engine.compute_dtype),
        **(extra or {}),
    }
    return save(folder, engine.num_steps_done, state, stored, group=group, keep=keep)


def load_engine(
    engine: Engine, path: Path, group: dist.ProcessGroup | None, manifest: Manifest | None = None
) -> dict[str, Any]:
    """Take everything from the checkpoint at ``path``, whatever ranks wrote it; returns its JSON. Collective.

    It is verified first, unless ``manifest`` is what its verification just gave.

    Raises:
        CorruptCheckpointError: a file is missing or changed.
        ValueError: the checkpoint is of another model or optimizer.
    """
    balance = engine.balance.state_dict()
    state = logical_state(engine, writing=False, balance=balance)
    manifest = load(path, state, group=group, manifest=manifest)
    engine.balance.load_state_dict(balance)
    engine.store.advance_epoch()
    engine.num_steps_done = manifest.step
    engine.num_skipped = manifest.extra["num_skipped"]
    engine.num_skipped_in_a_row = manifest.extra["num_skipped_in_a_row"]
    set_num_updates(engine.optimizer, manifest.extra["num_updates"])
    return manifest.extra


def logical_state(engine: Engine, *, writing: bool, balance: dict[str, Tensor]) -> dict[str, LogicalTensor]:
    """This rank's pieces. ``balance`` is the balancing state, saved from and loaded into these tensors.

    When ``writing``, what several ranks hold alike is named by one of them alone.
    """
    state: dict[str, LogicalTensor] = {}
    for shard in engine.dense:
        if not writing or counts(shard, engine.groups.mesh, engine.groups.rank):
            for prefix, tensor in _with_moments(engine, shard):
                pieces = (Piece(shard.offset, tensor),) if tensor.numel() else ()
                state[prefix + shard.name] = LogicalTensor(shard.shape, pieces)
    for shard in engine.experts:
        for prefix, tensor in _with_moments(engine, shard):
            state.update(_expert_entries(engine, shard, prefix, tensor))
    if not writing or engine.groups.rank == 0:
        state.update({f"balance.{name}": LogicalTensor.whole(tensor) for name, tensor in balance.items()})
    return state


def _with_moments(engine: Engine, shard: Shard) -> Iterator[tuple[str, Tensor]]:
    yield "", shard.local()
    for name, tensor in moments(engine.optimizer, shard).items():
        yield f"optim.{name}.", tensor


def _expert_entries(engine: Engine, shard: Shard, prefix: str, owned: Tensor) -> dict[str, LogicalTensor]:
    """Owned slices of each expert as pieces of its two matrices, padding left out."""
    layer = shard.expert_layer
    assert layer is not None
    shape, num_shards = engine.expert_shape, engine.store.placement(layer).num_shards
    shapes = {"w_in": shape.w_in_shape, "w_out": shape.w_out_shape}
    pieces: dict[str, list[Piece]] = {}
    matrix_of: dict[str, str] = {}
    for chunk in engine.store.owned_chunks(layer):
        place = 0
        for box in shape.boxes_of_shard(chunk.shard, num_shards, chunk.start, chunk.stop):
            name = f"{prefix}{expert_name(layer, chunk.expert)}.{box.matrix}"
            size = math.prod(box.shape)
            values = owned[chunk.row, place : place + size].view(box.shape)
            pieces.setdefault(name, []).append(Piece(box.offset, values))
            matrix_of[name] = box.matrix
            place += size
    return {name: LogicalTensor(shapes[matrix_of[name]], tuple(parts)) for name, parts in pieces.items()}


def _agreed_updates(engine: Engine, group: dist.ProcessGroup | None) -> int:
    """Updates made; a rank without parameters has counted none, so the most of all ranks is taken."""
    mine = num_updates(engine.optimizer)
    if group is None:
        return mine
    counts = [0] * dist.get_world_size(group)
    dist.all_gather_object(counts, mine, group=group)
    return max(counts)
