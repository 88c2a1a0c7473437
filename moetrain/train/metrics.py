"""``metrics.jsonl``: one JSON object per optimizer step, and one per evaluation."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moetrain.train.run_folder import write_whole


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
        """Everything so far; a last line that a crash cut short is left out."""
        if not self._path.is_file():
            return []
        records = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
        return records

    def truncate(self, step: int) -> None:
        """Forget what came after ``step``: a resumed run does those steps again."""
        kept = [json.dumps(record) + "\n" for record in self.records() if record["step"] <= step]
        write_whole(self._path, "".join(kept))
