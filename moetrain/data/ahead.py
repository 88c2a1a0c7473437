"""Reads ahead of use, in a thread."""

import threading
from collections.abc import Callable, Iterator
from queue import Empty, Full, Queue
from typing import Generic, TypeVar

Value = TypeVar("Value")

_PATIENCE_S = 0.1  # after which a waiting thread looks whether it is still wanted


class ReadAhead(Generic[Value]):
    """What ``make`` gives for 0, 1, ... ``count`` - 1, made in a thread while what came before is used.

    An error of ``make`` is raised where its value would have come. Whoever stops early calls ``close``, or lets it go:
    the thread ends by itself, and never keeps a process alive.
    """

    def __init__(self, make: Callable[[int], Value], count: int, *, depth: int = 2) -> None:
        """Begin.

        Args:
            make: called in the thread, in order.
            count: how many values there are.
            depth: values that may wait for use.
        """
        self._count = count
        self._ready: Queue[tuple[Value | None, BaseException | None]] = Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(
            target=_fill, args=(make, count, self._ready, self._closed), name="moetrain reader", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[Value]:
        try:
            for _ in range(self._count):
                value, error = self._take()
                if error is not None:
                    raise error
                yield value  # type: ignore[misc]
        finally:
            self.close()

    def close(self) -> None:
        """End the thread; later calls do nothing."""
        self._closed.set()
        self._thread.join()

    def _take(self) -> tuple[Value | None, BaseException | None]:
        while True:
            try:
                return self._ready.get(timeout=_PATIENCE_S)
            except Empty:
                if self._closed.is_set():
                    raise RuntimeError("ReadAhead: it was closed, so that nothing more comes; make another") from None

    def __del__(self) -> None:
        self._closed.set()


def _fill(
    make: Callable[[int], Value],
    count: int,
    ready: "Queue[tuple[Value | None, BaseException | None]]",
    closed: threading.Event,
) -> None:
    """Hold no reference to the reader, so that it can be let go."""
    for index in range(count):
        try:
            made: tuple[Value | None, BaseException | None] = (make(index), None)
        except BaseException as error:
            made = (None, error)
        while not closed.is_set():
            try:
                ready.put(made, timeout=_PATIENCE_S)
                break
            except Full:
                continue
        if closed.is_set() or made[1] is not None:
            return
