"""A whole training run: ``train(run)`` on every rank."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moetrain.checkpoint import Manifest as CheckpointManifest
from moetrain.checkpoint import list_checkpoints
from moetrain.checkpoint.folder import find_verified
from moetrain.checkpoint.names import step_of
from moetrain.config import RunConfig
from moetrain.config.sequence import MODELLED
from moetrain.data.dataset import PackedDataset
from moetrain.data.documents import DocumentDataset
from moetrain.data.loader import DocumentLoader, RowLoader, StepLoader
from moetrain.data.manifest import Manifest, data_facts
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.models.build import compute_dtype
from moetrain.sequence.planner import StepPlanner
from moetrain.train.agreement import Statement, dtype_name, require_agreement
from moetrain.train.engine import Engine, NonFiniteGradientError, StepReport
from moetrain.train.evaluate import evaluate
from moetrain.train.feed import StepFeed
from moetrain.train.measure_sequences import choose_profile
from moetrain.train.measure_sequences import in_words as sequences_in_words
from moetrain.train.metrics import MetricsLog
from moetrain.train.preflight import given_profile, open_datasets
from moetrain.train.progress import ProgressDisplay, StepLine
from moetrain.train.resume import layout, remarks, require_same_run
from moetrain.train.run_costs import in_words, measure_run_costs
from moetrain.train.run_folder import RunFolder, summary_lines
from moetrain.train.sequence_profile import KEY as PROFILE_KEY
from moetrain.train.sequence_profile import SequenceProfile
from moetrain.train.shared_folder import require_shared
from moetrain.train.source import DATA, Source
from moetrain.train.start import START, StartReport, agreed_source, start_engine
from moetrain.train.state import NEXT_ROW, load_engine, save_engine
from moetrain.train.summary import Validation, make_summary
from moetrain.train.tracing import LoadTracing, truncate_trace
from moetrain.train.world import (
    RefusedByAllError,
    World,
    keep_freed_memory,
    most_restarts,
    process_group,
    set_threads,
)


@dataclass(frozen=True, slots=True)
class Corpus:
    """The data of a run, opened and checked."""

    manifest: Manifest
    training: StepLoader
    validation: StepLoader

    @staticmethod
    def open(run: RunConfig) -> "Corpus":
        """Open both splits.

        Raises:
            ValueError: there is no such corpus, or its ids do not fit the model.
        """
        opened = open_datasets(run)
        return Corpus(opened.manifest, _loader(opened.training), _loader(opened.validation))


def _loader(dataset: PackedDataset | DocumentDataset) -> StepLoader:
    return RowLoader(dataset) if isinstance(dataset, PackedDataset) else DocumentLoader(dataset)


def train(run: RunConfig) -> dict[str, Any]:
    """Train as ``run`` says, going on from the newest valid checkpoint in its folder; returns the summary.

    What one rank can find wrong alone is checked before any process group exists; that all ranks share the run folder
    and are about to do the same right after, before anything there is loaded or changed.

    Raises:
        ValueError: the configuration does not fit the ranks, the data, or what the run folder holds.
    """
    started = time.monotonic()
    world = World.from_environment()
    run.validate_for(world.size)
    mesh = FoldedMesh.of_run(run, world.size)
    world.check_nodes(mesh.ranks_per_node)
    device = world.device(run.train.device)
    corpus = Corpus.open(run)
    profile = given_profile(run, world.size)
    folder = RunFolder(run.run_dir)
    run, source = folder.begin(run)
    stated = Statement.of(run, corpus.manifest, compute_dtype(run, device))
    set_threads(run.train, world)
    keep_freed_memory(device)
    in_use = folder.locked() if world.rank == 0 else nullcontext()
    with in_use, process_group(world, device, run.train.timeout_s):
        require_shared(folder.path)
        require_agreement(stated)
        if most_restarts(world):  # what there is now was made by the attempt before this one
            run, source = folder.begin(replace(run, train=replace(run.train, overwrite=False)))
        if world.rank == 0:
            folder.make(run)
        dist.barrier()
        groups = MeshGroups.create(
            mesh,
            device_type=device.type,
            timeout=timedelta(seconds=run.train.timeout_s),
            gangs=run.sequence.has_gangs,
        )
        session = Session(Engine(run, groups, device), corpus, folder, source, started, profile)
        try:
            summary = session.run()
        finally:
            session.feed.close()
        session.engine.placing.close()
        groups.close()
    return summary


class Session:
    """One process's part of a run, from the first step it does to the summary."""

    def __init__(
        self,
        engine: Engine,
        corpus: Corpus,
        folder: RunFolder,
        source: Source | None,
        started: float,
        profile: SequenceProfile | None = None,
    ) -> None:
        """Prepare.

        Args:
            engine: before its first step.
            corpus: the data.
            folder: of the run.
            source: the checkpoint of another run to start from if this one has none, as this rank has found it.
            started: when the process began, on the monotonic clock.
            profile: what the configuration names to weigh sequences by, as this rank has read it.
        """
        self.engine = engine
        self.config = engine.run
        self.corpus = corpus
        self.data = data_facts(corpus.manifest)
        self.folder = folder
        self.source = source
        self.start: StartReport | None = None  # of this run, whenever that was
        self.profile = profile
        self.metrics = MetricsLog(folder.metrics)
        self.tracing: LoadTracing | None = None  # from where the run begins on
        self.is_first = engine.groups.rank == 0
        # Checkpoints have a group of their own, on gloo: they move small Python objects, which live on the host.
        self.checkpoint_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=engine.run.train.timeout_s))
        self._started = started
        self._seconds_per_step = 0.0
        self._planned_ms = 0.0  # of the last step
        planner = StepPlanner.of(engine.run, engine.groups.mesh)
        self.feed = StepFeed(
            corpus.training, planner, engine.groups, self.checkpoint_group, batch_size=engine.run.data.batch_size
        )
        # Places of the data read by now, less a batch for each step: other than 0 where a run began at another's step
        # with another size of batch.
        self._places_ahead = 0

    def run(self) -> dict[str, Any]:
        """Resume, do the remaining steps, and write the summary. Collective."""
        num_steps = self.config.train.steps
        validation: Validation | None = None
        display = ProgressDisplay(num_steps, silent=not self.is_first, log_every=self.config.train.log_every)
        with display, self._way_back():
            self._begin(display)
            while self.engine.num_steps_done < num_steps:
                self._step(display)
                step = self.engine.num_steps_done
                if _due(step, self.config.train.eval_every, num_steps):
                    validation = self._evaluate(display)
                if _due(step, self.config.checkpoint.every, num_steps):
                    self._save()
            if validation is None:  # the run had ended before
                validation = self._evaluate(display, log=False)
        return self._finish(validation, display)

    @contextmanager
    def _way_back(self) -> Iterator[None]:
        """Tell whoever's run ended in NaN how to go on from before it with other settings."""
        try:
            yield
        except (NonFiniteGradientError, FloatingPointError) as error:
            saved = list_checkpoints(self.folder.checkpoints)
            steps = f"steps {', '.join(str(step_of(path)) for path in saved)} are saved" if saved else "none is saved"
            raise type(error)(
                f"{error}; to go on from an earlier step with other settings, start another run with --from "
                f"{self.folder.path}@STEP --run-dir NEW --optim.lr LOWER ({steps})"
            ) from error

    def _begin(self, display: ProgressDisplay) -> None:
        """Take up the newest checkpoint, or the other run's that this one starts from, or start from nothing."""
        found: tuple[Path, CheckpointManifest] | None = None
        if self.config.checkpoint.resume:
            found = find_verified(self.folder.checkpoints, self.checkpoint_group)
        if found is not None:
            self._resume(display, *found)
        else:
            if self.config.checkpoint.resume:
                self._require_none()
            if (source := agreed_source(self.source, self.checkpoint_group)) is not None:
                self._start(display, source)
        if self.is_first:
            self.folder.write_config(self.config)  # not before: a run that is refused leaves what it found
            step = self.engine.num_steps_done if found is not None else 0
            self.metrics.truncate(step)
            truncate_trace(self.folder.trace, step)
        self._measure(display)
        if self.config.sequence.costs != MODELLED:
            self._weigh_sequences(display, {} if found is None else found[1].extra)
        if self.config.placement.trace:
            assert self.engine.loads is not None
            self.tracing = LoadTracing(self.engine, self.engine.loads, self.folder.trace)
        mesh = self.engine.groups.mesh
        display.message(
            f"{self.engine.num_parameters():,} parameters on {mesh.world_size} {self.engine.device.type} rank(s): "
            f"{layout(mesh)}"
        )

    def _measure(self, display: ProgressDisplay) -> None:
        """Measure what plans weigh, unless a checkpoint has said it: the same plans follow from the same costs."""
        placing = self.engine.placing
        if (placing.weighs_costs or self.config.placement.trace) and not placing.measured_costs():
            placing.use_costs(measure_run_costs(self.engine))
            display.message(f"measured costs of a layer: {in_words(placing.costs)}")

    def _weigh_sequences(self, display: ProgressDisplay, extra: Mapping[str, Any]) -> None:
        """Plan by the costs that the run began with, or by those that it is given, or measure some. Collective."""
        in_folder = self.folder.read_profile() if self.is_first and self.engine.num_steps_done == 0 else None
        chosen = choose_profile(self.engine, extra, in_folder, self.profile, self.checkpoint_group)
        if chosen.is_new:
            display.message(f"measured costs of sequences: {sequences_in_words(chosen.profile)}")
        self.profile = chosen.profile
        self.engine.sequence_costs = chosen.profile.costs
        self.feed.planner = StepPlanner.of(self.config, self.engine.groups.mesh, chosen.profile.costs)
        if self.is_first:
            self.folder.write_profile(chosen.profile)

    def _resume(self, display: ProgressDisplay, path: Path, manifest: CheckpointManifest) -> None:
        dtype = dtype_name(self.engine.compute_dtype)
        require_same_run(self.folder, manifest.extra, self.config, self.data, dtype, self.checkpoint_group)
        load_engine(self.engine, path, self.checkpoint_group, manifest)
        display.message(f"resumed from {path}, after step {self.engine.num_steps_done}")
        if START in manifest.extra:
            self.start = StartReport.from_json(manifest.extra[START])
            self._note_start(self.start)
        self._count_places_from(manifest.extra)
        self._remark(display, manifest.extra)

    def _start(self, display: ProgressDisplay, source: Source) -> None:
        self.start = start_engine(self.engine, source, self.config.start, self.data, self.checkpoint_group)
        self._note_start(self.start)
        if self.config.start.position:
            self._count_places_from(source.manifest.extra)
        for line in self.start.lines():
            display.message(line)
        self._remark(display, source.manifest.extra)

    def _note_start(self, start: StartReport) -> None:
        """Let the configuration name the one checkpoint that the run started from, not the newest there now."""
        noted = replace(self.config.start, checkpoint=Path(start.checkpoint), sha256=start.sha256)
        self.config = replace(self.config, start=noted)
        self.engine.run = self.config

    def _count_places_from(self, extra: Mapping[str, Any]) -> None:
        """Where rows became documents, or documents rows, as many tokens are passed over."""
        own = self.engine.num_steps_done * self.config.data.batch_size
        found = extra.get(NEXT_ROW, own)
        packing = extra.get("config", {}).get("data", {}).get("packing", "rows")
        if NEXT_ROW in extra and packing != self.config.data.packing:
            length = extra["config"]["data"].get("seq_len", self.config.data.seq_len)
            found = found * length if packing == "rows" else found // self.config.data.seq_len
        self._places_ahead = found - own

    def _remark(self, display: ProgressDisplay, extra: Mapping[str, Any]) -> None:
        for remark in remarks(extra, self.config, self.engine.groups.mesh):
            display.message(remark)

    def _require_none(self) -> None:
        """Where no checkpoint is valid there must be none: a new start would cost the metrics of all their steps."""
        names = [[path.name for path in list_checkpoints(self.folder.checkpoints)]]
        dist.broadcast_object_list(names, group=self.checkpoint_group, group_src=0)
        if names[0]:
            raise RefusedByAllError(
                f"run_dir {self.folder.path} can only go on from a checkpoint that is whole, and none of "
                f"{', '.join(names[0])} is (see the warnings); restore one, or start anew in another --run-dir, or "
                "replace this run with --train.overwrite"
            )

    def _step(self, display: ProgressDisplay) -> None:
        begun = time.perf_counter()
        step = self.engine.num_steps_done
        plan, batches = self.feed.next(self._next_place(), step, last=step + 1 == self.config.train.steps)
        report = self.engine.step(plan, batches)
        self._planned_ms = plan.est_makespan_ms
        seconds = time.perf_counter() - begun
        if self.tracing is not None:
            self.tracing.record(self.engine.num_steps_done)
        if self.is_first:
            self._report(report, seconds, display)

    def _next_place(self) -> int:
        return self._places_ahead + self.engine.num_steps_done * self.config.data.batch_size

    def _report(self, report: StepReport, seconds: float, display: ProgressDisplay) -> None:
        step = self.engine.num_steps_done
        previous = self._seconds_per_step or seconds
        self._seconds_per_step = 0.9 * previous + 0.1 * seconds
        self.metrics.append(
            {
                "step": step,
                "loss": report.loss,
                "aux": report.aux,
                "lr": report.lr,
                "grad_norm": report.grad_norm,
                "max_vio": report.max_vio,
                "max_vio_per_layer": list(report.max_vio_per_layer),
                "num_tokens": report.num_tokens,
                "num_loss_tokens": report.num_loss_tokens,
                "tokens_per_second": report.num_tokens / seconds,
                "seconds": seconds,
                "feed_seconds": self.feed.waited_s,
                "skipped": report.skipped,
                "rows_added": report.rows_added,
                "rows_dropped": report.rows_dropped,
                "bytes_sent": report.bytes_sent,  # by this rank
                "bytes_between_nodes": report.bytes_between_nodes,
                "bytes_sent_by_all": report.bytes_sent_by_all,
                "bytes_between_nodes_by_all": report.bytes_between_nodes_by_all,
                **self._of_offload(report),
                **self._of_plans(),
                **self._of_sequences(),
            }
        )
        if report.num_tokens == 0:
            display.message(
                f"step {step}: no document begins in its {self.config.data.batch_tokens:,} places: nothing to learn"
            )
        if report.skipped:
            display.message(f"step {step}: the gradient norm was {report.grad_norm}; no parameter was changed")
        left = self._seconds_per_step * (self.config.train.steps - step)
        display.step(StepLine(step, report.loss, report.lr, report.num_tokens / seconds, report.max_vio, left))

    def _of_offload(self, report: StepReport) -> dict[str, float]:
        """Of this rank, where activations wait on the host."""
        if self.engine.offload is None:
            return {}
        return {"bytes_offloaded": report.bytes_offloaded, "offload_seconds": report.offload_seconds}

    def _of_plans(self) -> dict[str, float]:
        """How far the loads were from those that the step was planned for, over the sum of them."""
        error = self.engine.placing.error
        return {} if error is None else {"prediction_error": error}

    def _of_sequences(self) -> dict[str, float]:
        """What the step was to take, where sequences are weighed: without gathering and reducing dense parameters."""
        return {"planned_ms": self._planned_ms} if self.config.sequence.weighs_work else {}

    def _evaluate(self, display: ProgressDisplay, *, log: bool = True) -> Validation:
        step, train = self.engine.num_steps_done, self.config.train
        whole = self.corpus.validation.num_rows or 0
        num_rows = min(whole, train.eval_rows if step < train.steps else train.final_eval_rows or whole)
        if num_rows > train.eval_rows:
            display.message(f"validating on {num_rows:,} rows")
        loss = evaluate(self.engine, self.corpus.validation, num_rows)
        if loss is not None:
            if self.is_first and log:
                self.metrics.append({"step": step, "validation_loss": loss, "validation_rows": num_rows})
            display.message(f"step {step}/{self.config.train.steps}  validation loss {loss:.4f}")
        return Validation(loss, num_rows, whole)

    def _save(self) -> None:
        if self.tracing is not None:  # whoever goes on from the checkpoint has the loads up to it
            self.tracing.flush()
        save_engine(
            self.engine,
            self.folder.checkpoints,
            self.checkpoint_group,
            keep=self.config.checkpoint.keep,
            extra={DATA: self.data, NEXT_ROW: self._next_place(), **self._started_from(), **self._planned_by()},
        )

    def _started_from(self) -> dict[str, Any]:
        return {} if self.start is None else {START: self.start.to_json()}

    def _planned_by(self) -> dict[str, Any]:
        return {} if self.profile is None else {PROFILE_KEY: self.profile.to_json()}

    def _finish(self, validation: Validation, display: ProgressDisplay) -> dict[str, Any]:
        summary: dict[str, Any] = {}
        if self.is_first:
            seconds = time.monotonic() - self._started
            entropies = self.corpus.validation.entropies()
            summary = make_summary(self.engine, self.metrics.records(), validation, seconds, entropies)
            summary |= self._started_from()
            self.folder.write_summary(summary)
            for line in summary_lines(summary):
                display.message(line)
            display.message(f"run folder: {self.folder.path}")
        dist.barrier(group=self.checkpoint_group)
        dist.destroy_process_group(self.checkpoint_group)
        return summary


def _due(step: int, every: int, num_steps: int) -> bool:
    """Whether something done each ``every`` steps (0: only at the end) comes after ``step``."""
    return step == num_steps or (every > 0 and step % every == 0)
