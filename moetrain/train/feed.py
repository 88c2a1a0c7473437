"""Plans and batches of the steps to come, made beside the step that runs.

The first rank plans a step ahead, in a thread. Plans travel as arrays when the step begins, and each rank shows what it
got by a hash. Then it reads the pieces of its own rounds, a round ahead.
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed as dist

from moetrain.data.ahead import ReadAhead
from moetrain.data.loader import StepLoader
from moetrain.mesh.groups import MeshGroups
from moetrain.sequence.batch import PackedBatch
from moetrain.sequence.plan import HEADER_LENGTH, SequencePlan
from moetrain.sequence.planner import StepPlanner
from moetrain.train.world import RefusedByAllError

_FAILED = -1  # in place of a header's first number: the second one is the length of a message


class PlansDifferError(RuntimeError):
    """Ranks hold different plans of one step."""


class StepFeed:
    """Gives each step its plan and this rank's batches. Collective over the world, on the host."""

    def __init__(
        self,
        loader: StepLoader,
        planner: StepPlanner,
        groups: MeshGroups,
        group: dist.ProcessGroup,
        *,
        batch_size: int,
    ) -> None:
        """Begin with nothing planned.

        Args:
            loader: of the data.
            planner: equal on all ranks; the first one's is used.
            groups: this rank's.
            group: all ranks, for tensors on the host.
            batch_size: places of a step.
        """
        self.loader = loader
        self.planner = planner
        self.batch_size = batch_size
        self.waited_s = 0.0  # of the last step: for its plan, and for pieces
        self._group = group
        self._rank = groups.group_rank("data")
        self._is_first = dist.get_rank(group) == 0
        self._ahead: tuple[int, Future[SequencePlan]] | None = None
        self._worker = ThreadPoolExecutor(1, "moetrain planner") if self._is_first else None
        self._reading: ReadAhead[PackedBatch] | None = None

    def next(self, place: int, step: int, *, last: bool = False) -> tuple[SequencePlan, Iterator[PackedBatch]]:
        """The plan of a step, and this rank's batch of each of its rounds. Collective.

        Args:
            place: the first one of the step.
            step: its number, for messages.
            last: no step follows, so that none is planned.

        Raises:
            RefusedByAllError: the first rank could not plan; on every rank alike, with what it said.
            PlansDifferError: a rank got another plan than the first; on every rank alike.
        """
        begun = time.perf_counter()
        self.close_reading()
        plan = self._shared(place, step)
        if self._worker is not None and not last:
            following = place + self.batch_size
            self._ahead = following, self._worker.submit(self._plan, following)
        self._compare(plan, step)
        self._reading = ReadAhead(
            lambda round_idx: self.loader.batch(plan, self._rank, round_idx), plan.num_rounds(self._rank)
        )
        self.waited_s = time.perf_counter() - begun
        return plan, self._timed(iter(self._reading))

    def close_reading(self) -> None:
        """End the thread that reads."""
        if self._reading is not None:
            self._reading.close()
            self._reading = None

    def close(self) -> None:
        """End all threads; a plan that is under way is given up."""
        self.close_reading()
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)

    def _timed(self, batches: Iterator[PackedBatch]) -> Iterator[PackedBatch]:
        while True:
            begun = time.perf_counter()
            batch = next(batches, None)
            self.waited_s += time.perf_counter() - begun
            if batch is None:
                return
            yield batch

    def _plan(self, place: int) -> SequencePlan:
        return self.planner.plan(self.loader.table(place, self.batch_size))

    def _shared(self, place: int, step: int) -> SequencePlan:
        """The first rank's plan, on every rank."""
        if dist.get_world_size(self._group) == 1:
            return self._planned(place)
        header = torch.zeros(HEADER_LENGTH, dtype=torch.int64)
        content = torch.empty(0, dtype=torch.uint8)
        plan: SequencePlan | None = None
        if self._is_first:
            try:
                plan = self._planned(place)
                header, content = map(torch.from_numpy, plan.to_arrays())
            except Exception as error:
                content = torch.frombuffer(bytearray(str(error).encode()), dtype=torch.uint8)
                header[0], header[1] = _FAILED, len(content)
        dist.broadcast(header, group=self._group, group_src=0)
        failed = int(header[0]) == _FAILED
        if not self._is_first:
            size = int(header[1]) if failed else SequencePlan.size_of_content(header.numpy())
            content = torch.empty(size, dtype=torch.uint8)
        dist.broadcast(content, group=self._group, group_src=0)
        if failed:
            raise RefusedByAllError(f"step {step} cannot be planned: {content.numpy().tobytes().decode()}")
        return plan if plan is not None else SequencePlan.from_arrays(header.numpy(), content.numpy())

    def _planned(self, place: int) -> SequencePlan:
        """The plan that was made ahead, or one that is made now."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            found = ahead[1].result()
            if ahead[0] == place:
                return found
        return self._plan(place)

    def _compare(self, plan: SequencePlan, step: int) -> None:
        """Refuse plans of which one differs, naming the step, the ranks and the hashes."""
        mine = self.digest_of(plan)
        digests = [torch.empty(32, dtype=torch.uint8) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(digests, torch.frombuffer(bytearray(mine), dtype=torch.uint8), group=self._group)
        found = [bytes(digest.numpy()) for digest in digests]
        others = [rank for rank, digest in enumerate(found) if digest != found[0]]
        if others:
            raise PlansDifferError(
                f"step {step}: all ranks must have one plan of sequences, but rank {others[0]} has "
                f"{found[others[0]].hex()[:16]} and rank 0 {found[0].hex()[:16]} ({len(others)} rank(s) differ); "
                "nothing was computed. The network or a machine's memory is at fault: look at that rank's machine, and "
                "go on from the last checkpoint"
            )

    def digest_of(self, plan: SequencePlan) -> bytes:
        """SHA-256 of a plan, as this rank has it."""
        return bytes.fromhex(plan.content_hash())
