"""The progress of a long verification: one line of JSON per case, written as soon as the case has ended.

The first line says which code wrote the file. A run goes on with a file of its own code alone: cases that other code
proved say nothing about this one.
"""

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import moetrain
from moetrain.config.errors import require
from moetrain.verify.errors import TOLERANCE
from moetrain.verify.report import VerifyReport

PARTS = ("config", "mesh", "models", "moe", "ops", "oracle", "placement", "sequence", "train", "cost", "verify")
_OUTCOME = b'{"case": '  # the beginning of each line but the first
REPORTERS = ("compare", "product/progress", "product/prove", "product/summary")  # verify/*: they run and report


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one case ended. Errors are relative, the worst of all ranks; None where infinite, or nothing was measured."""

    case: str
    ranks: int
    dtype: str
    seed: int
    loss: float | None = None  # and its auxiliary part
    grad: float | None = None  # and the gradient's norm
    param: float | None = None  # and the selection biases
    wrong_counts: int = 0
    error: str | None = None  # what kept the case from finishing
    seconds: float = 0.0

    @classmethod
    def of(cls, case: str, report: VerifyReport, seconds: float) -> Self:
        """What is kept of a report."""
        errors = (report.max_rel_error_loss, report.max_rel_error_grad, report.max_rel_error_param)
        loss, grad, param = (error if math.isfinite(error) else None for error in errors)
        spec = report.spec
        return cls(
            case, spec.ranks, spec.dtype, spec.seed, loss, grad, param, report.wrong_counts, report.error, seconds
        )

    @property
    def ok(self) -> bool:
        """Whether everything was compared and lies within the tolerance."""
        errors = (self.loss, self.grad, self.param)
        within = all(error is not None and error <= TOLERANCE[self.dtype] for error in errors)
        return self.error is None and within and self.wrong_counts == 0


class Progress:
    """The outcomes in a file, and those to come. A context manager that holds the file open.

    Args:
        path: made where it is missing.

    Raises:
        ValueError: the file was written by other code, is no such file, or another run is writing it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        try:
            self._lock()
            self.outcomes = read_outcomes(path)
            whole = _whole(path.read_bytes())
            self._file.truncate(len(whole))  # half a line goes: a run's own, or ``read_outcomes`` had refused it
            if not whole:
                self._write(_header())
        except BaseException:
            self._file.close()
            raise

    def add(self, outcome: Outcome) -> None:
        """Keep an outcome; it is on the disk when this returns."""
        self.outcomes[outcome.case] = outcome
        self._write(json.dumps(asdict(outcome), allow_nan=False))

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"--progress: {self.path} must be of one run at a time, but another one writes it; name another file "
                "for each shard, and join them by --also"
            ) from error

    def _write(self, line: str) -> None:
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        self._file.close()


def read_outcomes(path: Path) -> dict[str, Outcome]:
    """The outcomes in a file, by case; none where there is no file. Another run may be writing it.

    Raises:
        ValueError: the file was written by other code, or is no such file.
    """
    text = path.read_bytes() if path.exists() else b""
    whole, header = _whole(text), _header().encode()
    first, *lines = whole.splitlines() or [b""]
    half = text[len(whole) :]
    is_ours = first == header if whole else header.startswith(half)
    require(
        is_ours,
        f"--progress: {path} must be of this code, whose first line would be {_header()}, but it begins with "
        f"{_shown(first or half)}; name another file, or check out the code that wrote it",
    )
    outcomes = [_outcome(line, path) for line in lines]
    if whole and not (half.startswith(_OUTCOME) or _OUTCOME.startswith(half)):
        raise ValueError(_strange_line(path, half))
    return {outcome.case: outcome for outcome in outcomes}


def _outcome(line: bytes, path: Path) -> Outcome:
    try:
        return Outcome(**json.loads(line))
    except (ValueError, TypeError) as error:
        raise ValueError(_strange_line(path, line)) from error


def _strange_line(path: Path, line: bytes) -> str:
    return (
        f"--progress: {path} must hold one outcome per line, but a line of it begins with {_shown(line)}; remove that "
        "line, or name another file"
    )


def _shown(line: bytes) -> str:
    return line[:200].decode(errors="backslashreplace")


def _whole(text: bytes) -> bytes:
    """The lines that have ended: a run that was killed may have left half of one."""
    return text[: text.rfind(b"\n") + 1]


def _header() -> str:
    return json.dumps({"moetrain verify product": moetrain.__version__, "code": fingerprint()})


def fingerprint() -> str:
    """Of all source files that decide what a case computes and what it is compared with."""
    digest = hashlib.sha256()
    root = Path(moetrain.__file__).parent
    for path in sorted(_sources(root)):
        digest.update(path.relative_to(root.parent).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _sources(root: Path) -> Iterator[Path]:
    others = {root / "verify" / f"{module}.py" for module in REPORTERS}
    for part in PARTS:
        yield from (path for path in (root / part).rglob("*.py") if path not in others)
    yield from (path for path in (root.parent / "csrc").rglob("*") if path.suffix in (".h", ".cpp"))  # no CUDA on CPUs
