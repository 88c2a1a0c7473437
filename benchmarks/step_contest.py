"""Training steps of moetrain and of others in turns, on the same random rows. See bench_step.py."""

import math
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from hf_step import HuggingFaceLoop, Layout, layouts
from torch import Tensor

from moetrain.sequence import batch as batches
from moetrain.sequence.batch import PackedBatch
from moetrain.sequence.data_planner import plan_data
from moetrain.sequence.plan import Item, Sequence, SequencePlan
from moetrain.train.engine import Engine
from moetrain.train.world import World

_TRIAL_STEPS = 3
_HOPELESS = 2.5  # times the best so far
_NEAR = 1.3
_NUM_CUT = 3  # so many of the fastest are tried with half our micro-batch, too


@dataclass(slots=True)
class Contest:
    """Competitors by name; each call is one step on all ranks and returns this rank's loss."""

    steps: dict[str, Callable[[], float]]
    first_loss: dict[str, float]
    seconds: dict[str, list[float]] = field(default_factory=dict)
    trial_seconds: dict[str, float] = field(default_factory=dict)

    def race(self, warm_up: int, rounds: int) -> None:
        """Fill ``seconds``: steps in turn, after ``warm_up`` unmeasured ones each. Collective."""
        for _ in range(warm_up):
            for step in self.steps.values():
                step()
        self.seconds = {name: [] for name in self.steps}
        for _ in range(rounds):
            for name, step in self.steps.items():
                self.seconds[name].append(timed(step))


def ours_only(engine: Engine) -> Contest:
    """No competitor; the first loss is checked. Collective."""
    loss = our_step(engine)
    check_first_loss("moetrain", loss, math.log(engine.run.model.vocab_size), 0.1)
    return Contest({"moetrain": lambda: our_step(engine)}, {"moetrain": loss})


def with_hugging_face(engine: Engine, world: World, threads: int) -> Contest:
    """The transformers loop as well: the two fastest of its layouts, if the second is near the first. Collective."""
    parameters = engine.whole.parameters()
    contest = ours_only(engine)
    tried: dict[Layout, float] = {}

    def try_out(layout: Layout) -> None:
        step, loss, first_seconds = _peer(engine, layout, parameters, world, threads)
        if world.rank == 0:
            tolerance = 1e-2 if torch.bfloat16 in (layout.dtype, engine.store.compute_dtype) else 1e-3
            check_first_loss(str(layout), loss, contest.first_loss["moetrain"], tolerance)
            contest.first_loss[str(layout)] = loss
        tried[layout] = _trial(step, first_seconds, min(tried.values(), default=math.inf))
        contest.trial_seconds[str(layout)] = tried[layout]

    for layout in layouts(engine.run, world.size, engine.store.compute_dtype):
        try_out(layout)
    for layout in _fastest(tried, _NUM_CUT) if engine.run.data.micro_batch % 2 == 0 else []:
        try_out(replace(layout, cut=2))
    first, *others = _fastest(tried, 2)
    for layout in [first, *(other for other in others if tried[other] <= _NEAR * tried[first])]:
        contest.steps[str(layout)], *_ = _peer(engine, layout, parameters, world, threads)
    return contest


def _fastest(tried: dict[Layout, float], count: int) -> list[Layout]:
    return sorted(tried, key=tried.__getitem__)[:count]


def _trial(step: Callable[[], float], first_seconds: float, best: float) -> float:
    """The least seconds of some steps; of none more where the first one was hopeless already. Collective."""
    seconds = _agreed(first_seconds)
    for _ in range(_TRIAL_STEPS):
        if seconds > _HOPELESS * best:
            break
        seconds = min(seconds, _agreed(timed(step)))
    return seconds


def _agreed(seconds: float) -> float:
    """Rank 0's, since clocks differ and all ranks must decide alike."""
    box = [seconds]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def _peer(
    engine: Engine, layout: Layout, parameters: dict[str, Tensor], world: World, threads: int
) -> tuple[Callable[[], float], float, float]:
    """The peer's step; its loss before any update (its mean over ranks); the seconds of that first step."""
    if not layout.ddp and world.rank != 0:
        return _wait_for_rank_0, math.nan, timed(_wait_for_rank_0)
    cores = threads if layout.ddp else threads * world.local_size
    loop = HuggingFaceLoop(engine.run, layout, parameters, world.size)
    if loop.num_parameters() != engine.num_parameters():
        raise ValueError(
            f"{layout}: it must have as many parameters as moetrain's model, {engine.num_parameters()}, "
            f"got {loop.num_parameters()}"
        )
    batches = [
        (token_id_BS.to(engine.device), target_BS.to(engine.device))
        for rank in ([engine.groups.group_rank("data")] if layout.ddp else range(engine.groups.size("data")))
        for batch in rows_of(engine, rank)
        for token_id_BS, target_BS in zip(
            *(tensor_BS.chunk(layout.cut) for tensor_BS in by_row(batch, engine.run.data.seq_len)), strict=True
        )
        if token_id_BS.shape[0]
    ]
    losses = []

    def step() -> float:
        torch.set_num_threads(cores)
        losses.append(loop.step(batches))
        torch.set_num_threads(threads)
        if not layout.ddp and world.size > 1:
            dist.barrier()
        return losses[-1]

    seconds = timed(step)
    loss = torch.tensor(losses[0], dtype=torch.float64)
    if layout.ddp and world.size > 1:
        dist.all_reduce(loss)
        loss /= world.size
    return step, loss.item(), seconds


def _wait_for_rank_0() -> float:
    dist.barrier()
    return math.nan


def check_first_loss(name: str, loss: float, expected: float, tolerance: float) -> None:
    """Refuse to time a model that is not the one meant."""
    if not abs(loss - expected) <= tolerance * expected:
        raise ValueError(f"{name}: the first loss must be within {tolerance:.1%} of {expected:.4f}, got {loss:.4f}")


def our_step(engine: Engine) -> float:
    """One step on random rows, which are the same on every number of ranks."""
    return engine.step(_plan(engine), rows_of(engine, engine.groups.group_rank("data"))).loss


def rows_of(engine: Engine, rank: int) -> list[PackedBatch]:
    """The micro-batches of a data rank."""
    run, plan = engine.run, _plan(engine)
    num_rounds: Any = plan.num_rounds  # a number in older checkouts, for compare_checkouts.py
    items = [plan.item_at(rank, idx) for idx in range(num_rounds(rank) if callable(num_rounds) else num_rounds)]
    return [batch_of(item, run.data.seq_len, run.model.vocab_size) for item in items]


def _plan(engine: Engine) -> SequencePlan:
    data = engine.run.data
    sequences = [Sequence(row, data.seq_len, data.seq_len) for row in range(data.global_batch)]
    return plan_data(sequences, engine.groups.size("data"), data.micro_batch)


def by_row(batch: PackedBatch, seq_len: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets of full rows, [B, S] each."""
    return batch.token_id_T.view(-1, seq_len), batch.target_T.view(-1, seq_len)


def batch_of(item: Item | None, seq_len: int, vocab: int) -> PackedBatch:
    row_ids = () if item is None else item.sequence_ids
    token_BS1 = torch.empty(len(row_ids), seq_len + 1, dtype=torch.int64)
    for token_S1, row in zip(token_BS1, row_ids, strict=True):
        torch.randint(0, vocab, (seq_len + 1,), generator=torch.Generator().manual_seed(row), out=token_S1)
    return one_document_each(token_BS1, row_ids)


def one_document_each(token_BS1: Tensor, row_ids: Iterable[int]) -> PackedBatch:
    """Rows of S tokens and their last target; in matrices where ``moetrain`` is from before 2026-12."""
    token_id_BS, target_BS = token_BS1[:, :-1].contiguous(), token_BS1[:, 1:].contiguous()
    num_rows, length = token_id_BS.shape
    if not hasattr(batches, "Piece"):  # an older checkout, for compare_checkouts.py
        position_BS = torch.arange(length).expand(num_rows, -1).contiguous()
        ids_B = torch.tensor(list(row_ids), dtype=torch.int64)
        return PackedBatch(token_id_BS, target_BS, position_BS, torch.zeros_like(position_BS), ids_B)  # type: ignore
    pieces = tuple(batches.Piece(row_id, 0, length, 0) for row_id in row_ids)
    return PackedBatch(token_id_BS.flatten(), target_BS.flatten(), pieces)


def timed(step: Callable[[], float]) -> float:
    """Seconds from when all ranks are ready to when this one is done, and all ranks' work with it."""
    _meet()
    begun = time.perf_counter()
    step()
    _meet()
    return time.perf_counter() - begun


def _meet() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.barrier()
