"""Standard output and error that do not end a command: work goes on when nobody reads what it says any more."""

import errno
import io
import os
import sys
from typing import Any, TextIO

_NOBODY_READS = (errno.EPIPE, errno.EIO)  # a closed pipe; a terminal that hung up


class PatientOutput(io.FileIO):
    """A descriptor that is written to as long as that works. The first failure is kept, and all after it pass."""

    def __init__(self, descriptor: int) -> None:
        """``descriptor`` stays open when this is closed."""
        super().__init__(descriptor, "w", closefd=False)
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write ``data``, or drop it; returns its bytes as written."""
        if self.failure is None:
            try:
                return super().write(data) or 0
            except BlockingIOError:
                raise
            except OSError as error:
                self.failure = error
        return len(memoryview(data).cast("B"))


def make_output_patient() -> list[PatientOutput]:
    """Put ``PatientOutput`` under ``sys.stdout`` and ``sys.stderr`` where these are the process's own; returns them.

    A character that the terminal's encoding lacks, or of a name that is not UTF-8, is written as an escape.
    """
    sys.stdout, out = _patient(sys.stdout, sys.__stdout__)
    sys.stderr, err = _patient(sys.stderr, sys.__stderr__)
    return [*out, *err]


def lost_output(outputs: list[PatientOutput]) -> OSError | None:
    """Why output did not get to somebody who waits for it, as on a full disk, or None. Flushes."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    failures = [output.failure for output in outputs if output.failure is not None]
    return next((failure for failure in failures if failure.errno not in _NOBODY_READS), None)


def _patient(stream: TextIO | None, own: TextIO | None) -> tuple[TextIO, list[PatientOutput]]:
    if stream is None:  # the shell closed it (>&-); what is opened next must not get its descriptor
        return open(os.devnull, "w", encoding="utf-8"), []  # as long as the process
    if stream is not own or not isinstance(stream, io.TextIOWrapper):
        return stream, []
    stream.flush()
    output = PatientOutput(stream.fileno())
    patient = io.TextIOWrapper(
        io.BufferedWriter(output),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
    return patient, [output]
