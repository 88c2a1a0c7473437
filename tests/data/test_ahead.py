"""Reading ahead in a thread."""

import threading
import time
from typing import NoReturn

import pytest

from moetrain.data.ahead import ReadAhead


def threads() -> int:
    return sum(thread.name == "moetrain reader" for thread in threading.enumerate())


def test_values_come_in_order_and_ahead_of_use() -> None:
    made: list[int] = []

    def make(index: int) -> int:
        made.append(index)
        return 10 * index

    reader = ReadAhead(make, 5, depth=2)
    values = iter(reader)
    assert next(values) == 0
    deadline = time.monotonic() + 10
    while len(made) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert made[:3] == [0, 1, 2]
    assert len(made) <= 4, "two wait, and one is in hand"
    assert list(values) == [10, 20, 30, 40]
    assert threads() == 0


def test_an_error_comes_where_its_value_would_have() -> None:
    def make(index: int) -> int:
        if index == 2:
            raise ValueError("no such row")
        return index

    values = iter(ReadAhead(make, 9))
    assert [next(values), next(values)] == [0, 1]
    with pytest.raises(ValueError, match="no such row"):
        next(values)
    assert threads() == 0


def test_whoever_stops_early_leaves_no_thread() -> None:
    reader = ReadAhead(lambda index: index, 1000)
    assert next(iter(reader)) == 0
    reader.close()
    reader.close()
    assert threads() == 0
    for value in ReadAhead(lambda index: index, 1000):
        if value == 3:
            break
    deadline = time.monotonic() + 10
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads() == 0


def test_none_and_nothing() -> None:
    assert list(ReadAhead(lambda index: None, 3)) == [None] * 3

    def never(index: int) -> NoReturn:
        raise AssertionError("nothing was asked for")

    assert list(ReadAhead(never, 0)) == []
