"""Whether a run may go on from a checkpoint, and what is no longer as it was when that was written."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from moetrain.config import RunConfig
from moetrain.config.load import run_from_dict
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.models.build import most_owned
from moetrain.train.differences import looks_at_micro_batches
from moetrain.train.placing_state import what_is_lost
from moetrain.train.run_folder import RunFolder
from moetrain.train.source import DATA, differences_from, means_same, start_difference
from moetrain.train.world import RefusedByAllError


def require_same_run(
    folder: RunFolder,
    extra: Mapping[str, Any],
    run: RunConfig,
    data: Mapping[str, Any],
    dtype: str,
    group: dist.ProcessGroup,
) -> None:
    """Go on only if the first rank finds that ``run`` is the one that a checkpoint is of. Collective over ``group``.

    Args:
        folder: of the run.
        extra: the checkpoint's JSON.
        run: the configuration to go on with.
        data: what the dataset holds now; see ``data_facts``.
        dtype: of compute now, as ``"bfloat16"``.
        group: all ranks.

    Raises:
        RefusedByAllError: it is another run, or the data are others; on every rank alike.
    """
    said = [not_resumable(folder, extra, run, data, dtype) if dist.get_rank(group) == 0 else ""]
    dist.broadcast_object_list(said, group=group, group_src=0)
    if said[0]:
        raise RefusedByAllError(said[0])


def not_resumable(
    folder: RunFolder, extra: Mapping[str, Any], run: RunConfig, data: Mapping[str, Any], dtype: str
) -> str:
    """The sentence that refuses, or nothing. The dataset may have moved where the checkpoint says what it holds."""
    if "config" in extra:
        try:
            saved = run_from_dict(extra["config"])
        except (ValueError, TypeError) as error:
            return folder.other_run([f"it is not one of this version: {error}"])
        if DATA in extra:
            saved = replace(saved, data=replace(saved.data, path=run.data.path))
        if not means_same(run.start, saved.start, folder.path):
            return folder.other_run([start_difference(saved.start, run.start)])
        if differences := differences_from(saved, extra, run, dtype):
            return folder.other_run(differences)
    return folder.other_data(run, extra.get(DATA, data), data)


def remarks(extra: Mapping[str, Any], run: RunConfig, mesh: FoldedMesh) -> list[str]:
    """What changed with a checkpoint's machine, and changes what is learnt from here on.

    Args:
        extra: the checkpoint's JSON.
        run: the configuration to go on with, the checkpoint's but for what is free.
        mesh: where ranks stand now.
    """
    found = []
    fields = looks_at_micro_batches(run)
    if fields and "config" in extra and "world_size" in extra:
        saved = run_from_dict(extra["config"])
        then, now = in_words(saved, FoldedMesh.of_run(saved, extra["world_size"])), in_words(run, mesh)
        if then != now:
            found.append(
                f"on {now}, the checkpoint's steps before it on {then}: {' and '.join(fields)} will "
                "look at other sets of tokens, so what is learnt from here on is not what it would have been there"
            )
    if run.placement.moves and (lost := what_is_lost(extra, mesh, most_owned(run, mesh))) is not None:
        found.append(lost)
    return found


def in_words(run: RunConfig, mesh: FoldedMesh) -> str:
    """Which tokens a rank sees together follows from this: the mesh, and who shares sequences where that is planned."""
    planned = f", sequences by {run.sequence.planner} within {run.capacity} tokens" if run.plans_tokens else ""
    return f"{layout(mesh)}{f', cp={mesh.cp}' if mesh.cp > 1 else ''}{planned}"


def layout(mesh: FoldedMesh) -> str:
    """A mesh in words, as ``"dp=2, tp=1, edp=1, ep=2, etp=1"``."""
    return f"dp={mesh.size('data')}, tp={mesh.tp}, edp={mesh.edp}, ep={mesh.ep}, etp={mesh.etp}"
