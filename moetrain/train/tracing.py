"""Writes the loads of every step into a run's folder, as ``moetrain.placement.trace`` has them.

A piece holds at most a hundred steps. It is written when it is full, and with every checkpoint as far as it is: what a
run that was killed goes on from is there. Shapes: L MoE layers, G groups of ranks, E experts.
"""

import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from moetrain.config import RunConfig
from moetrain.placement.loads import ExpertLoads, NodeLoads
from moetrain.placement.trace import Trace, TraceFacts, piece_path, pieces, read_piece
from moetrain.train.engine import Engine
from moetrain.train.placing import pool_layout

PIECE_STEPS = 100
logger = logging.getLogger(__name__)


class LoadRecorder:
    """Writes pieces into a folder. One rank has it."""

    def __init__(self, folder: Path, layers: tuple[int, ...], facts: TraceFacts) -> None:
        """Name the folder; it is made with the first piece.

        Args:
            folder: of the pieces.
            layers: indices of the MoE layers.
            facts: of the run.
        """
        self.folder = folder
        self.facts = facts
        self._layers = layers
        self._first_step = 0
        self._rows: list[NDArray[np.int32]] = []

    def append(self, step: int, count_LGE: Tensor) -> None:
        """Take the loads of ``step`` (from 1), which follows the one before."""
        if not self._rows:
            self._first_step = step
        assert step == self._first_step + len(self._rows), "steps are recorded one after another"
        self._rows.append(count_LGE.numpy())
        if len(self._rows) == PIECE_STEPS:
            self.flush()
            self._rows.clear()

    def flush(self) -> None:
        """Write what there is of the present piece."""
        if self._rows:
            self.folder.mkdir(exist_ok=True)
            trace = Trace(np.stack(self._rows), self._first_step, self._layers, self.facts)
            trace.save(piece_path(self.folder, self._first_step))


class LoadTracing:
    """Gathers the loads of each step from all ranks; the first one writes them."""

    def __init__(self, engine: Engine, loads: ExpertLoads, folder: Path) -> None:
        """Prepare.

        Args:
            engine: after it has its costs.
            loads: what its layers count.
            folder: of the pieces.
        """
        self._engine = engine
        self._loads = loads
        self._layout = pool_layout(engine.groups.mesh)
        layers = tuple(engine.run.model.moe_layers)
        self._recorder = (
            LoadRecorder(folder, layers, facts_of(engine, self._layout["groups per node"]))
            if engine.groups.rank == 0
            else None
        )

    def record(self, step: int) -> None:
        """After ``step`` (from 1). Collective over the pool."""
        groups = self._engine.groups
        group = groups.pool_rank // self._layout["shards"]
        counts = NodeLoads(self._loads.take_step(), group, self._layout["groups"], groups.group("pool"))
        count_LGE = counts.wait()
        if self._recorder is not None:
            self._recorder.append(step, count_LGE)

    def flush(self) -> None:
        """Write what there is."""
        if self._recorder is not None:
            self._recorder.flush()


def facts_of(engine: Engine, groups_per_node: int) -> TraceFacts:
    """What a trace of this engine's run says beside its counts."""
    run: RunConfig = engine.run
    return TraceFacts(
        groups_per_node=groups_per_node,
        planner=run.placement.planner,
        top_k=run.moe.top_k,
        width=run.model.width,
        expert_width=run.moe.expert_width,
        gated=run.moe.gated,
        costs=engine.placing.measured_costs(),
    )


def truncate_trace(folder: Path, step: int) -> None:
    """Forget what came after ``step``: a resumed run does those steps again.

    A piece that is damaged goes as well, and a warning says so.
    """
    for path in reversed(pieces(folder)):
        try:
            piece = read_piece(path)
        except ValueError as error:
            logger.warning("%s: a damaged piece of the trace was removed (%s)", path, error)
            path.unlink()
            continue
        if piece.last_step <= step:
            return
        if piece.first_step > step:
            path.unlink()
        else:
            piece.until(step).save(path)
