"""``metrics.jsonl``: one JSON object per optimizer step, and one per evaluation."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moetrain.config.files import write_whole
from moetrain.train.own_files import strange_lines

logger = logging.getLogger(__name__)


class MetricsLog:
    """Appends records; every record has ``step``, the optimizer steps done."""

    def __init__(self, path: Path) -> None:
        """Name the file; it is created by the first record."""
        self._path = path

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record. It reaches the file at once, as one line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """Everything so far. What is no record is left out: a last line that a crash cut short, or a damaged one."""
        if not self._path.is_file():
            return []
        return [record for line in self._path.read_bytes().splitlines() if (record := _record(line)) is not None]

    def truncate(self, step: int) -> None:
        """Forget what came after ``step``: a resumed run does those steps again.

        A line that a crash cut short or emptied goes as well, and a warning says so. All others stay as they are.

        Raises:
            ValueError: a line is there that no run has written.
        """
        if not self._path.is_file():
            write_whole(self._path, "")
            return
        if strange := strange_lines(self._path):
            raise ValueError(
                f"{self._path} must hold what runs have written alone, but its line {strange[0]} is something else; "
                "move that line, or rename the file"
            )
        lines = [line for line in self._path.read_bytes().splitlines() if line.strip()]
        records = [(line, _record(line)) for line in lines]
        kept = [line.decode() for line, record in records if record is not None and record["step"] <= step]
        if num_lost := sum(record is None for _, record in records):
            logger.warning("%s: %d line(s) that a crash had damaged were removed", self._path, num_lost)
        write_whole(self._path, "".join(f"{line}\n" for line in kept))


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # also of bytes that are not UTF-8
        return None
    is_record = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if is_record else None
