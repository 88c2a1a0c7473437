"""Steps of sequences of very unequal lengths under two planners, computed by real ranks. See bench_hdp.py.

Byted's lengths over 256, cut at 8,192 tokens; ranks that hold 4,096. ``context`` packs them by tokens for two ranks
each, ``moetrain`` plans by costs measured beforehand.

More ranks than cores cannot be timed by the clock on the wall. So each rank notes the processor time of its thread for
each round, and a step is replayed from that: a round takes as long as its slowest rank, with what its ring's messages
were measured to take (as if nothing hid it), and all ranks wait for one another.
"""

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from local_ranks import on_local_ranks
from torch import Tensor

from moetrain.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    RunConfig,
    SequenceConfig,
    TrainConfig,
)
from moetrain.cost.sequence_costs import SequenceCosts
from moetrain.data.entropy import Entropies
from moetrain.data.loader import StepLoader
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.sequence import SequencePlan, StepPlanner
from moetrain.sequence.batch import PackedBatch
from moetrain.sequence.lengths import draw_lengths
from moetrain.sequence.plan import Ints
from moetrain.train.engine import Engine
from moetrain.train.feed import StepFeed
from moetrain.train.measure_sequences import measure_sequences

SCALE, CONTEXT, CAPACITY = 256, 8192, 4096
FULL_ROUNDS = 2  # tokens of a step, in ranks full of them
PLANNERS = ("context", "moetrain")


def run_of(planner: str) -> RunConfig:
    """A model of two layers that spends on attention about what ByteScale's charts show at 8K tokens."""
    return RunConfig(
        model=ModelConfig(num_layers=2, width=256, num_heads=4, num_kv_heads=2, head_dim=64, vocab_size=512),
        moe=MoEConfig(num_experts=8, top_k=2, expert_width=256),
        mesh=MeshConfig(cp=2 if planner == "context" else 1, ep=2),
        data=DataConfig(packing="documents", context=CONTEXT, batch_tokens=CAPACITY),
        sequence=SequenceConfig(planner=planner, capacity=CAPACITY),  # type: ignore[arg-type]
        optim=OptimConfig(),
        train=TrainConfig(device="cpu", dtype="float32", threads=1),
    )


class RandomDocuments(StepLoader):
    """Sequences of drawn lengths and random tokens; one place of the data is a whole step."""

    def __init__(self, num_ranks: int) -> None:
        self._num_tokens = FULL_ROUNDS * CAPACITY * num_ranks
        self._lengths: dict[int, int] = {}

    def table(self, first: int, count: int) -> Ints:
        """The step ``first``."""
        lengths = draw_lengths("byted", self._num_tokens, CONTEXT, seed=first, scale=SCALE)
        ids = (first << 32) + torch.arange(len(lengths)).numpy()
        self._lengths.update(zip(ids.tolist(), lengths.tolist(), strict=True))
        return torch.stack([torch.from_numpy(x) for x in (ids, lengths, lengths)], dim=1).numpy()

    def batch(self, plan: SequencePlan, rank: int, round_idx: int) -> PackedBatch:
        """A rank's part of a round."""
        self._lengths.update((int(id), int(n)) for id, n, _ in plan.sequence_N3)
        return super().batch(plan, rank, round_idx)

    @property
    def num_rows(self) -> None:
        """There is no end."""

    def entropies(self) -> Entropies:
        """Nobody asks."""
        raise NotImplementedError

    def open(self, sequence_id: int) -> "_RandomDocument":
        """One of them."""
        return _RandomDocument(sequence_id, self._lengths[sequence_id])


class _RandomDocument:
    def __init__(self, sequence_id: int, num_tokens: int) -> None:
        self.borders: Sequence[int] = (0, num_tokens)
        self._drawn = torch.Generator().manual_seed(sequence_id)

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(
            512, (self.borders[-1] + 1,), generator=self._drawn.manual_seed(self._drawn.initial_seed())
        )
        return tokens[start:stop], tokens[start + 1 : stop + 1]


def measured_costs() -> SequenceCosts:
    """On two ranks, which have a core each."""
    return SequenceCosts.from_json(on_local_ranks(2, _measure)[0])


def _measure(rank: int) -> dict[str, Any]:
    engine = _engine("moetrain")
    return measure_sequences(engine).costs.to_json()


def replayed(num_ranks: int, steps: int, costs: SequenceCosts) -> dict[str, Any]:
    """What steps take by planner, in seconds, and how much longer under ``context``; without messages too."""
    found = on_local_ranks(num_ranks, _noted, steps, costs.to_json())
    seconds: dict[str, dict[str, list[float]]] = {}
    for planner in PLANNERS:
        with_messages, without = [], []
        for step in range(steps):
            rounds = list(zip(*(of_rank[planner][step] for of_rank in found), strict=True))
            with_messages.append(sum(max(cpu_s + ring_s for cpu_s, ring_s in lanes) for lanes in rounds))
            without.append(sum(max(cpu_s for cpu_s, _ in lanes) for lanes in rounds))
        seconds[planner] = {"replayed_s": with_messages, "compute_s": without}
    context, ours = (seconds[planner] for planner in PLANNERS)
    return {
        "seconds": seconds,
        "replayed_over_context": sum(context["replayed_s"]) / sum(ours["replayed_s"]),
        "compute_over_context": sum(context["compute_s"]) / sum(ours["compute_s"]),
    }


def _noted(rank: int, steps: int, costs_json: dict[str, Any]) -> dict[str, list[list[tuple[float, float]]]]:
    """By planner and step, of each round of this rank: processor seconds, and seconds of its ring's messages."""
    costs, found = SequenceCosts.from_json(costs_json), {}
    for planner in PLANNERS:
        engine = _engine(planner)
        loader = RandomDocuments(engine.groups.size("data"))
        plans = StepPlanner.of(engine.run, engine.groups.mesh, costs)
        mine, of_steps = engine.lane.rank, []
        for step in range(-1, steps):  # the first is not counted
            plan = plans.plan(loader.table(max(step, 0), 1))
            marks: list[float] = []
            engine.step(plan, _marked((loader.batch(plan, mine, idx) for idx in range(plan.num_rounds(mine))), marks))
            ring_s = dict.fromkeys(range(plan.num_rounds(mine)), 0.0)
            for item in plan.items_of(mine):
                ring_s[item.round] = _ring_s(plan, item.round, mine, costs)
            of_steps.append([(marks[idx + 1] - marks[idx], ring_s[idx]) for idx in range(len(marks) - 1)])
        found[planner] = of_steps[1:]
    return found


def _marked(batches: Iterable[PackedBatch], marks: list[float]) -> Iterator[PackedBatch]:
    """The batches; notes the thread's processor time whenever one is asked for."""
    for batch in batches:
        marks.append(time.thread_time())
        yield batch
    marks.append(time.thread_time())


def _ring_s(plan: SequencePlan, round_idx: int, rank: int, costs: SequenceCosts) -> float:
    item = next(item for item in plan.items_of(rank) if item.round == round_idx)
    tokens, others = sum(sequence.num_tokens for sequence in plan.sequences_of(item)), len(item.ranks) - 1
    share = tokens / len(item.ranks)
    return sum(others * (one.hop_ms + one.hop_token_ms * share) for one in (costs.forward, costs.backward)) / 1e3


def on_the_wall(steps: int, costs: SequenceCosts) -> dict[str, float]:
    """Two ranks with a core each, steps in turns: how much longer ``context`` takes, and the share of a step that
    planning and reading ahead keep it waiting.
    """
    return on_local_ranks(2, _timed, steps, costs.to_json())[0]


def _timed(rank: int, steps: int, costs_json: dict[str, Any]) -> dict[str, float]:
    costs = SequenceCosts.from_json(costs_json)
    engines = {planner: _engine(planner) for planner in PLANNERS}
    feeds = {
        planner: StepFeed(
            RandomDocuments(2), StepPlanner.of(engine.run, engine.groups.mesh, costs), engine.groups,
            engine.groups.group("world"), batch_size=1,
        )
        for planner, engine in engines.items()
    }  # fmt: skip
    seconds: dict[str, list[float]] = {planner: [] for planner in PLANNERS}
    waited: list[float] = []
    for step in range(steps + 1):
        for planner, engine in engines.items():
            dist.barrier()
            begun = time.perf_counter()
            engine.step(*feeds[planner].next(step, step, last=step == steps))
            dist.barrier()
            seconds[planner].append(time.perf_counter() - begun)
            if planner == "moetrain":
                waited.append(feeds[planner].waited_s / seconds[planner][-1])
    for feed in feeds.values():
        feed.close()
    context, ours = (seconds[planner][1:] for planner in PLANNERS)
    return {
        "wall_over_context": statistics.median(a / b for a, b in zip(context, ours, strict=True)),
        "planning_exposed": statistics.median(waited[1:]),
        "seconds": statistics.median(ours),
    }


def _engine(planner: str) -> Engine:
    run = run_of(planner)
    groups = MeshGroups.create(FoldedMesh.of_run(run, dist.get_world_size()), gangs=True)
    return Engine(run, groups, "cpu")
