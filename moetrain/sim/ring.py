"""A ring of ranks in one process: threads that hand each other messages, for tests and for one device."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Queue
from typing import TypeVar

from torch import Tensor

from moetrain.sequence.ring import Arriving

T = TypeVar("T")
SECONDS = 30.0  # a rank that waits for longer would do so for ever


@dataclass(slots=True, eq=False)
class _Message:
    inbox: "Queue[Tensor]"
    receive: Tensor

    def wait(self) -> None:
        self.receive.copy_(self.inbox.get(timeout=SECONDS))


class ThreadRing:
    """One rank of it; ``sent`` is what it has sent, in bytes."""

    def __init__(self, rank: int, inboxes: "list[Queue[Tensor]]") -> None:
        """Take a place.

        Args:
            rank: the place.
            inboxes: of all ranks, from the one before each.
        """
        self.rank, self.size = rank, len(inboxes)
        self._inboxes = inboxes
        self.sent = 0

    def exchange(self, send: Tensor, receive: Tensor) -> Arriving:
        """See ``Ring``."""
        self.sent += send.nbytes
        self._inboxes[(self.rank + 1) % self.size].put(send.clone())
        return _Message(self._inboxes[self.rank], receive)


def run_on_ring(size: int, body: Callable[[ThreadRing], T]) -> list[T]:
    """What ``body`` returns on each rank of a ring.

    Raises:
        Exception: what ``body`` raised on the first rank that did.
    """
    inboxes: list[Queue[Tensor]] = [Queue() for _ in range(size)]
    with ThreadPoolExecutor(size) as threads:
        futures = [threads.submit(body, ThreadRing(rank, inboxes)) for rank in range(size)]
        return [future.result(timeout=2 * SECONDS) for future in futures]
