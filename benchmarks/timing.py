"""What benchmarks share: fair alternation, medians, where and with what they ran, and one way to write results."""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

RESULTS = Path(os.environ.get("MOETRAIN_RESULTS") or Path(__file__).parent / "results")


@dataclass(frozen=True, slots=True)
class Row:
    """One case: the median milliseconds of each competitor; ratios are to the first, which is ours."""

    case: str
    median_ms: dict[str, float]
    best_ms: dict[str, float]

    @property
    def ratios(self) -> dict[str, float]:
        """How many times longer than ours each other competitor took."""
        ours, *others = self.median_ms
        return {name: self.median_ms[name] / self.median_ms[ours] for name in others}


def compare(case: str, competitors: Mapping[str, Callable[[], object]], *, rounds: int = 11) -> Row:
    """Time the competitors in turn, A B A B, after one unmeasured turn each; all in this process."""
    taken_ms: dict[str, list[float]] = {name: [] for name in competitors}
    for call in competitors.values():
        call()
    for _ in range(rounds):
        for name, call in competitors.items():
            taken_ms[name].append(_time_ms(call))
    return Row(
        case,
        {name: median(times) for name, times in taken_ms.items()},
        {name: min(times) for name, times in taken_ms.items()},
    )


def _time_ms(call: Callable[[], object]) -> float:
    _wait_for_device()
    start = time.perf_counter()
    call()
    _wait_for_device()
    return (time.perf_counter() - start) * 1e3


def _wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def machine() -> dict[str, str]:
    """What a figure depends on: hardware, versions, commit and command."""
    return {
        "hardware": torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()}",
        "load": " ".join(f"{load:.1f}" for load in os.getloadavg()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "command": " ".join(["python", *sys.argv]),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _commit() -> str:
    here = Path(__file__).parent
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def table(rows: list[Row]) -> str:
    """A Markdown table: median milliseconds, then the others' ratio to ours; blank where one did not take part."""
    names = list(dict.fromkeys(name for row in rows for name in row.median_ms))
    head = ["case", *(f"{name}, ms" for name in names), *(f"{name} / {names[0]}" for name in names[1:])]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for row in rows:
        times = [f"{row.median_ms[name]:.3f}" if name in row.median_ms else "" for name in names]
        ratios = [f"{row.ratios[name]:.2f}" if name in row.ratios else "" for name in names[1:]]
        lines.append([row.case, *times, *ratios])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def report(what: str, rows: list[Row], *, save_as: str | None) -> None:
    """Print the machine and the table; with ``save_as`` (a hardware tag) also write both to ``results/``."""
    where = machine()
    text = "\n".join([f"# {what}", "", *(f"- {key}: {value}" for key, value in where.items()), "", table(rows), ""])
    sys.stdout.write(text)
    if save_as is None:
        return
    RESULTS.mkdir(exist_ok=True)
    stem = RESULTS / f"{what}_{save_as}_{time.strftime('%Y%m')}"
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(
        json.dumps({"machine": where, "rows": [asdict(row) for row in rows]}, indent=1)
    )


def arguments(description: str) -> argparse.Namespace:
    """The options every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--rounds", type=int, default=11, help="turns per competitor")
    parser.add_argument("--threads", type=int, default=None, help="torch threads; its own choice if left out")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save-as", default=None, help="hardware tag; writes results/<what>_<tag>_<YYYYMM>.{md,json}")
    chosen = parser.parse_args()
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    return chosen
