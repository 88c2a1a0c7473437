"""The test suite of an older checkout and of a newer one in turns.

    python benchmarks/bench_suite.py ../older ../newer --rounds 2 --json out.json

Both folders must have been set up (``bash launch/test.sh`` ran there). Each turn removes what linters and pytest
remember and runs all of ``launch/test.sh``: checks and tests. The two take turns, and swap places from round to round.
``suite_ratio`` is the newer one's median of seconds over the older one's. A run that fails ends the comparison.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from bench_setup import commit_of, environment, order
from timing import machine

CACHES = (".mypy_cache", ".ruff_cache", ".pytest_cache", ".import_linter_cache")
COMMAND = ("bash", "launch/test.sh")


def main() -> None:
    chosen = arguments()
    folders = {"older": chosen.older.resolve(), "newer": chosen.newer.resolve()}
    commits = {name: commit_of(folder, "HEAD") for name, folder in folders.items()}
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in folders}
    for number in range(chosen.rounds):
        for name in order(number):
            turns[name].append(turn_of(folders[name]))
            print(f"{name}: {turns[name][-1]['seconds']:.0f} s, {turns[name][-1]['passed']:.0f} tests", flush=True)
    newer, older = (median(turn["seconds"] for turn in turns[name]) for name in ("newer", "older"))
    print(f"suite_ratio {newer / older:.3f}")
    if chosen.json is not None:
        command = " ".join(["python", "benchmarks/bench_suite.py", "OLDER", "NEWER", "--rounds", str(chosen.rounds)])
        report = {"machine": {**machine(), "command": command}, "commits": commits, "suite_ratio": newer / older}
        chosen.json.write_text(json.dumps({**report, "turns": turns}, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("older", type=Path, help="a checkout that is set up")
    parser.add_argument("newer", type=Path, help="another one")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each, in turns (default 1)")
    parser.add_argument("--json", type=Path, default=None, metavar="PATH")
    chosen = parser.parse_args()
    if chosen.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {chosen.rounds}")
    for folder in (chosen.older, chosen.newer):
        if not (folder / ".venv").is_dir():
            parser.error(f"{folder} is not set up: it has no .venv; run bash launch/test.sh there first")
    return chosen


def turn_of(folder: Path) -> dict[str, float]:
    """Seconds, and how many tests passed.

    Raises:
        SystemExit: the suite failed; the end of what it said was shown.
    """
    for cache in CACHES:
        shutil.rmtree(folder / cache, ignore_errors=True)
    start = time.monotonic()
    done = subprocess.run(COMMAND, cwd=folder, env=environment(), capture_output=True, text=True, check=False)
    seconds = time.monotonic() - start
    said = done.stdout + done.stderr
    if done.returncode != 0:
        sys.exit(f"{said[-4000:]}\nbench_suite: {' '.join(COMMAND)} failed in {folder}; what it said is above")
    return {"seconds": seconds, "passed": sum(map(int, re.findall(r"(\d+) passed", said)))}


if __name__ == "__main__":
    main()
