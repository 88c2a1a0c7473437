"""What a verification of the full product has shown so far, small enough to keep beside the code."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import moetrain
from moetrain.verify.errors import TOLERANCE
from moetrain.verify.product.cases import AXES, RANKS, SETTINGS, Unit, case_id, foldings, refused_layouts
from moetrain.verify.product.progress import Outcome, fingerprint
from moetrain.verify.report import versions

ERRORS = ("loss", "grad", "param")


def summarise(all_units: Sequence[Unit], outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """Counts, the largest errors of each folding, and each failure in full.

    Args:
        all_units: the full product.
        outcomes: by case.
    """
    folding_of = {case_id(case): unit.folding for unit in all_units for case in unit.cases}
    done = [outcomes[case] for case in folding_of if case in outcomes]
    equal = [outcome for outcome in done if outcome.ok]
    return {
        "cases": {
            "in all": len(folding_of),
            "equal": len(equal),
            "not equal": sum(not outcome.ok and outcome.error is None for outcome in done),
            "not finished": sum(outcome.error is not None for outcome in done),
            "to do": len(folding_of) - len(done),
        },
        "layouts refused": refused_layouts(),
        "worst": {dtype: _worst(equal, dtype) | {"tolerance": TOLERANCE[dtype]} for dtype in TOLERANCE},
        "equal by setting": _by_setting(equal),
        "median seconds by ranks": {
            ranks: round(median([outcome.seconds for outcome in done if outcome.ranks == ranks] or [0.0]), 3)
            for ranks in RANKS
        },
        "hours": round(sum(outcome.seconds for outcome in done) / 3600, 2),
        "machine": machine(),
        "foldings": _by_folding(equal, folding_of),
        "failures": [asdict(outcome) for outcome in done if not outcome.ok],
    }


def _worst(equal: Iterable[Outcome], dtype: str) -> dict[str, Any]:
    alike = [outcome for outcome in equal if outcome.dtype == dtype]
    worst = {name: max((getattr(outcome, name) for outcome in alike), default=None) for name in ERRORS}
    return {"equal": len(alike)} | {
        name: None if error is None else float(f"{error:.2g}") for name, error in worst.items()
    }


def _by_setting(equal: Iterable[Outcome]) -> dict[str, int]:
    """How many equal cases have each value of each setting."""
    counts = {f"{name}={value}": 0 for name, values in SETTINGS.items() for value in values}
    for outcome in equal:
        for name, value in zip(SETTINGS, outcome.case.split("-")[-len(SETTINGS) :], strict=True):
            counts[f"{name}={value}"] += 1
    return counts


def _by_folding(equal: Iterable[Outcome], folding_of: Mapping[str, tuple[int, ...]]) -> list[dict[str, Any]]:
    of: dict[tuple[int, ...], list[Outcome]] = {folding: [] for folding in foldings()}
    for outcome in equal:
        of[folding_of[outcome.case]].append(outcome)
    return [
        {
            **dict(zip(("ranks", *AXES), folding, strict=True)),
            **{dtype: list(_worst(found, dtype).values()) for dtype in TOLERANCE},
        }
        for folding, found in of.items()
    ]


def machine() -> dict[str, str]:
    """What the figures depend on: hardware, versions, commit, code and command."""
    return {
        "hardware": f"{_cpu_name()}, {os.cpu_count()} threads",
        **versions(),
        "commit": _commit(),
        "code": fingerprint(),
        "command": " ".join(["moetrain", "verify", *sys.argv[sys.argv.index("product") :]])
        if "product" in sys.argv
        else "",
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The short commit of the source tree, with a + where it has changes; nothing outside a repository."""
    root = Path(moetrain.__file__).parent.parent
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    answer = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return answer.stdout.strip()


def as_json(value: Any, *, indent: int = 0) -> str:
    """JSON in which every list item, and every value of a nested object, has a line of its own.

    Keeps a summary small, and its changes readable.
    """
    if indent < 2 and isinstance(value, dict) and value:
        inner = ",\n".join(
            f"{' ' * (indent + 1)}{json.dumps(str(key))}: {as_json(value[key], indent=indent + 1)}" for key in value
        )
        return "{\n" + inner + "\n" + " " * indent + "}"
    if indent < 2 and isinstance(value, list) and value:
        inner = ",\n".join(" " * (indent + 1) + json.dumps(item, allow_nan=False) for item in value)
        return "[\n" + inner + "\n" + " " * indent + "]"
    return json.dumps(value, allow_nan=False)
