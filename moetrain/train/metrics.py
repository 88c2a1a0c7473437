"""``metrics.jsonl``: one JSON object per optimizer step, and one per evaluation."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moetrain.config.files import write_whole


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
        """Forget what came after ``step``: a resumed run does those steps again."""
        kept = [json.dumps(record) + "\n" for record in self.records() if record["step"] <= step]
        write_whole(self._path, "".join(kept))


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # also of bytes that are not UTF-8
        return None
    is_record = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if is_record else None
