"""An engine's state as a checkpoint sees it: logical tensors under logical names, and a little JSON.

Keys (see ``models.names``): a dense parameter's own name; ``layers.{l}.moe.experts.{e}.w_in`` and ``.w_out`` for each
expert; the same names after ``optim.exp_avg.`` and ``optim.exp_avg_sq.`` for moments; ``balance.layers.{l}.*``;
``placement.loads.{i}``, what plans expect loads from. None of them says how many ranks there were, so a checkpoint
loads under any mesh.

Balance used to be a row per MoE layer of ``balance.lagged_count_LE`` and ``balance.bias_LE``; such checkpoints still
load.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from moetrain.checkpoint import Manifest
from moetrain.checkpoint.folder import verify
from moetrain.checkpoint.save_load import load, save
from moetrain.checkpoint.shards import LogicalTensor, TensorShard
from moetrain.config.load import to_dict
from moetrain.models import names
from moetrain.train.agreement import dtype_name
from moetrain.train.engine import Engine
from moetrain.train.grad_norm import counts
from moetrain.train.optimizer import moments, num_updates, set_num_updates
from moetrain.train.placing import held_by_owners
from moetrain.train.placing_state import (
    loads_to_load,
    loads_to_save,
    owners_to_restore,
    placing_json,
    restore_placing,
)
from moetrain.train.shards import Shard

NEXT_ROW = "next_row"  # key in a checkpoint's JSON: the packed row that the next step begins with


def save_engine(
    engine: Engine, folder: Path, group: dist.ProcessGroup | None, *, keep: int = 0, extra: dict[str, Any] | None = None
) -> Path:
    """Write a checkpoint of ``engine`` into ``folder``. Collective over ``group``, which holds all ranks."""
    state = state_to_save(engine)
    stored = {
        "num_updates": _agreed_updates(engine, group),
        "num_skipped": engine.num_skipped,
        "num_skipped_in_a_row": engine.num_skipped_in_a_row,
        NEXT_ROW: engine.num_steps_done * engine.run.data.batch_size,
        "world_size": engine.groups.mesh.world_size,
        "config": to_dict(engine.run),
        "dtype": dtype_name(engine.compute_dtype),
        **placing_json(engine.placing),
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
    manifest = verify(path, group) if manifest is None else manifest
    balance, loads = engine.balance.state_dict(), loads_to_load(engine.placing, manifest)
    if (owner_LE := owners_to_restore(engine.placing, manifest.extra)) is not None:
        like = engine.store.placement(engine.store.layers[0])
        engine.move_owners(held_by_owners(engine.store.layers, owner_LE, like))
    load(path, state_to_load(engine, balance, manifest) | loads, group=group, manifest=manifest)
    engine.balance.load_state_dict(balance)
    restore_placing(engine.placing, manifest.extra, loads)
    engine.store.advance_epoch()
    engine.num_steps_done = manifest.step
    engine.num_skipped = manifest.extra["num_skipped"]
    engine.num_skipped_in_a_row = manifest.extra["num_skipped_in_a_row"]
    set_num_updates(engine.optimizer, manifest.extra["num_updates"])
    return manifest.extra


def state_to_save(engine: Engine) -> dict[str, LogicalTensor]:
    """This rank's shards; what several ranks hold alike is named by one of them alone."""
    state = parameter_state(engine, writing=True)
    if engine.groups.group_rank("pool") == 0:  # a pipeline's stage has layers of its own
        state |= balance_state(engine.balance.state_dict()) | loads_to_save(engine.placing)
    return state


def state_to_load(
    engine: Engine, balance: Mapping[int, Mapping[str, Tensor]], manifest: Manifest
) -> dict[str, LogicalTensor]:
    """This rank's shards, under the names that the checkpoint has.

    Args:
        engine: whose parameters and moments are loaded in place.
        balance: its ``BalanceState.state_dict``, loaded in place.
        manifest: of the checkpoint.
    """
    stacked = names.balance_of_all_layers("bias_E") in manifest.tensors
    all_layers = engine.run.model.moe_layers
    kept = stacked_balance_state(balance, all_layers) if stacked else balance_state(balance)
    return parameter_state(engine, writing=False) | kept


def parameter_state(engine: Engine, *, writing: bool) -> dict[str, LogicalTensor]:
    """This rank's shards of parameters and their moments.

    When ``writing``, what several ranks hold alike is named by one of them alone.
    """
    state: dict[str, LogicalTensor] = {}
    for shard in engine.dense:
        if not writing or counts(shard, engine.groups.mesh, engine.groups.rank):
            for of, tensor in _with_moments(engine, shard):
                mine = (TensorShard(shard.offset, tensor),) if tensor.numel() else ()
                state[_named(shard.name, of)] = LogicalTensor(shard.shape, mine)
    for shard in engine.experts:
        for of, tensor in _with_moments(engine, shard):
            state.update(_expert_entries(engine, shard, of, tensor))
    return state


def balance_state(balance: Mapping[int, Mapping[str, Tensor]]) -> dict[str, LogicalTensor]:
    """What ``BalanceState.state_dict`` gave, saved from and loaded into these tensors."""
    return {
        names.balance(layer, kept): LogicalTensor.whole(tensor_E)
        for layer, tensors in balance.items()
        for kept, tensor_E in tensors.items()
    }


def stacked_balance_state(
    balance: Mapping[int, Mapping[str, Tensor]], all_layers: Sequence[int]
) -> dict[str, LogicalTensor]:
    """The same as rows of one tensor for all MoE layers.

    Args:
        balance: of the layers that this rank has; loaded into.
        all_layers: MoE layers of the whole model, ascending.
    """
    rows: dict[str, list[TensorShard]] = {}
    for layer, tensors in balance.items():
        for kept, tensor_E in tensors.items():
            row = TensorShard((all_layers.index(layer), 0), tensor_E.unsqueeze(0))
            rows.setdefault(names.balance_of_all_layers(kept), []).append(row)
    return {
        name: LogicalTensor((len(all_layers), shards[0].tensor.shape[1]), tuple(shards))
        for name, shards in rows.items()
    }


def _named(name: str, moment: str | None) -> str:
    return name if moment is None else names.moment(moment, name)


def _with_moments(engine: Engine, shard: Shard) -> Iterator[tuple[str | None, Tensor]]:
    """A shard's values, then its moments by name."""
    yield None, shard.local()
    yield from moments(engine.optimizer, shard).items()


def _expert_entries(engine: Engine, shard: Shard, moment: str | None, owned: Tensor) -> dict[str, LogicalTensor]:
    """Owned slices of each expert as boxes of its two matrices, padding left out."""
    layer = shard.expert_layer
    assert layer is not None
    shape, num_shards = engine.expert_shape, engine.store.placement(layer).num_shards
    shapes = {"w_in": shape.w_in_shape, "w_out": shape.w_out_shape}
    shards: dict[str, list[TensorShard]] = {}
    matrix_of: dict[str, str] = {}
    for chunk in engine.store.owned_chunks(layer):
        place = 0
        for box in shape.boxes_of_shard(chunk.shard, num_shards, chunk.start, chunk.stop):
            name = _named(names.expert(layer, chunk.expert, box.matrix), moment)
            size = math.prod(box.shape)
            values = owned[chunk.row, place : place + size].view(box.shape)
            shards.setdefault(name, []).append(TensorShard(box.offset, values))
            matrix_of[name] = box.matrix
            place += size
    return {name: LogicalTensor(shapes[matrix_of[name]], tuple(found)) for name, found in shards.items()}


def _agreed_updates(engine: Engine, group: dist.ProcessGroup | None) -> int:
    """Updates made; a rank without parameters has counted none, so the most of all ranks is taken."""
    mine = num_updates(engine.optimizer)
    if group is None:
        return mine
    counts = [0] * dist.get_world_size(group)
    dist.all_gather_object(counts, mine, group=group)
    return max(counts)
