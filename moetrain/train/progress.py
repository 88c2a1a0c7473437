"""What a user sees while training: a bar in a terminal, plain lines elsewhere."""

from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


@dataclass(frozen=True, slots=True)
class StepLine:
    """The numbers of one step."""

    step: int
    loss: float
    lr: float
    tokens_per_second: float
    max_vio: float
    seconds_left: float

    def text(self) -> str:
        """The line without its step."""
        return (
            f"loss {self.loss:.4f}  lr {self.lr:.2e}  {self.tokens_per_second:,.0f} tokens/s  "
            f"MaxVio {self.max_vio:.2f}  {duration(self.seconds_left)} left"
        )


class ProgressDisplay:
    """Shows steps and messages; a silent one (every rank but the first) shows nothing. Use as a context."""

    def __init__(self, num_steps: int, *, silent: bool, log_every: int, console: Console | None = None) -> None:
        """Prepare; a terminal gets a bar, anything else one line per ``log_every`` steps."""
        self._num_steps = num_steps
        self._log_every = log_every
        self._silent = silent
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        if self._console.is_terminal and not silent:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[line]}"),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("step", total=num_steps, line="")

    def __enter__(self) -> "ProgressDisplay":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, line: StepLine) -> None:
        """Show one step."""
        if self._silent:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=line.step, line=line.text())
        elif line.step % self._log_every == 0 or line.step in (1, self._num_steps):
            self._write(f"step {line.step}/{self._num_steps}  {line.text()}")

    def message(self, text: str) -> None:
        """Show a line that stays."""
        if not self._silent:
            self._write(text)

    def _write(self, text: str) -> None:
        self._console.print(text, markup=False)
        self._console.file.flush()


def duration(seconds: float) -> str:
    """``seconds`` as people write it: 42s, 3m 05s, 2h 10m."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
