"""Set-up of an older version and of this one in turns: fresh clone to first loss, compile, rebuild.

    python benchmarks/bench_setup.py --json out.json
    python benchmarks/bench_setup.py --older 8ad8183 --rounds 3 --save-as my-machine

Each turn clones a commit into a new folder and runs its quick start until the first loss is on the screen, then
compiles its extension from nothing in the folder that this has set up, then again after touching one kernel of each
family. The package cache is as the user has it (warm, if packages were installed before), a compiler cache is off. The
two versions take turns, and swap places from round to round. Ratios are medians of newer over older:

    first_loss_ratio       seconds from the clone to the line with the first loss
    compile_cpu_ratio      CPU seconds of compiling for the machine at hand, as the quick start does
    compile_all_cpu_ratio  the same with MOETRAIN_BUILD_ISA=all, as for wheels and tests (8ad8183 has no choice)
    rebuild_ratio          seconds after touching the worst of these kernels over those of the older one's full compile

Commits are compared, not files that are not committed.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from timing import RESULTS, machine

ROOT = Path(__file__).parents[1]
FIRST_LOSS = "step 1/"
# The largest of each family. Those of expert_mlp and attention are compiled once for each instruction set.
TOUCHED = tuple(
    f"csrc/cpu/{kernel}"
    for kernel in (
        "attention/tasks.h",
        "chunks/chunks.cpp",
        "expert_mlp/forward.h",
        "norm/rms_norm.cpp",
        "rounding/offer_pairs.cpp",
        "routing/select_experts.cpp",
        "rows/scatter_add_rows.cpp",
    )
)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a command took. CPU is that of all its processes."""

    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Turn:
    """What one clone of one version took; ``rebuild`` by the file that was touched."""

    first_loss_seconds: float
    first_loss: str
    compile: Cost
    compile_all: Cost
    rebuild: Mapping[str, Cost]


def main() -> None:
    chosen = arguments()
    commits = {name: commit_of(chosen.repository, getattr(chosen, name)) for name in ("older", "newer")}
    turns: dict[str, list[Turn]] = {name: [] for name in commits}
    for number in range(chosen.rounds):
        for name in order(number):
            kernels = chosen.touch if name == "newer" else ()
            with fresh_clone(chosen.repository, commits[name], chosen.scratch) as clone:
                turns[name].append(turn_of(clone, kernels, steps=chosen.steps))
            print(f"{name}: {line_of(turns[name][-1])}", flush=True)
    report = {"machine": machine(), "commits": commits, **ratios(turns)}
    report["turns"] = {name: [asdict(turn) for turn in of] for name, of in turns.items()}
    print("  ".join(f"{name} {value:.3f}" for name, value in ratios(turns).items()))
    for path in filter(None, (chosen.json, chosen.save_as and RESULTS / f"setup_{chosen.save_as}.json")):
        path.write_text(json.dumps(report, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--older", default="8ad8183", help="commit to compare with (default 8ad8183)")
    parser.add_argument("--newer", default="HEAD", help="commit (default HEAD)")
    parser.add_argument("--rounds", type=int, default=2, help="clones of each, in turns (default 2)")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of each quick start (default 2)")
    parser.add_argument("--touch", nargs="*", default=TOUCHED, metavar="FILE", help="kernels to compile again")
    parser.add_argument("--repository", type=Path, default=ROOT, help="what to clone (default: this one)")
    parser.add_argument("--scratch", type=Path, default=None, help="where clones are made and removed; 2 GB each")
    parser.add_argument("--json", type=Path, default=None, metavar="PATH")
    parser.add_argument("--save-as", default=None, metavar="TAG")
    chosen = parser.parse_args()
    if chosen.rounds < 1 or chosen.steps < 1:
        parser.error(f"--rounds and --steps must be at least 1, got {chosen.rounds} and {chosen.steps}")
    return chosen


def order(number: int) -> list[str]:
    """Who comes first changes from round to round, so that neither always finds the other's files in memory."""
    return ["older", "newer"] if number % 2 == 0 else ["newer", "older"]


def commit_of(repository: Path, name: str) -> str:
    """The commit's full name.

    Raises:
        SystemExit: there is no such commit.
    """
    command = ["git", "-C", str(repository), "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(
            f"bench_setup: {repository} has no commit {name!r}; fetch it, or name another with --older and --newer"
        )
    return done.stdout.strip()


@contextmanager
def fresh_clone(repository: Path, commit: str, scratch: Path | None) -> Iterator["Clone"]:
    """A clone that is gone afterwards. Its clock starts before it is made."""
    folder = Path(tempfile.mkdtemp(prefix="moetrain-setup-", dir=scratch))
    clone = Clone(folder / "moetrain", time.monotonic())
    try:
        for words in (
            ["clone", "--quiet", "--no-checkout", str(repository.resolve()), str(clone.root)],
            ["-C", str(clone.root), "checkout", "--quiet", "--detach", commit],
        ):
            subprocess.run(["git", *words], check=True)
        yield clone
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Clone:
    """A folder, and the time at which its making began."""

    root: Path
    began: float

    def run(self, command: Sequence[str], **env: str) -> Cost:
        """Run to the end.

        Raises:
            SystemExit: it failed; what it said was shown.
        """
        before, start = cpu_of_children(), time.monotonic()
        done = subprocess.run(
            command, cwd=self.root, env=environment(**env), text=True, check=False, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        if done.returncode != 0:
            sys.exit(f"{done.stdout}bench_setup: {' '.join(command)} failed in a clone; what it said is above")
        return Cost(time.monotonic() - start, cpu_of_children() - before)

    def first_loss(self, steps: int) -> tuple[float, str]:
        """Seconds from the clone to the first line with a loss of the quick start, and the line.

        Raises:
            SystemExit: it ended without one.
        """
        command = ["bash", "launch/quickstart.sh", "--steps", str(steps)]
        said: list[str] = []
        found: tuple[float, str] | None = None
        with subprocess.Popen(
            command, cwd=self.root, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process:  # fmt: skip
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    said.append(line)
                    if found is None and FIRST_LOSS in line:
                        found = time.monotonic() - self.began, line.strip()
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        if process.returncode != 0 or found is None:
            sys.exit(f"{''.join(said)}bench_setup: the quick start failed or showed no loss; what it said is above")
        return found


def environment(**env: str) -> dict[str, str]:
    """This process's, without its virtual environment and with no compiler cache."""
    left_out = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "MOETRAIN_BUILD_ISA", "OMP_NUM_THREADS")
    kept = {
        name: value for name, value in os.environ.items() if name not in left_out and not name.startswith("CCACHE_")
    }
    own = Path(sys.prefix, "bin") if sys.prefix != sys.base_prefix else None
    folders = [folder for folder in kept.get("PATH", "").split(os.pathsep) if folder and Path(folder) != own]
    caches = {"CCACHE_DISABLE": "1", "MOETRAIN_COMPILER_CACHE": "none"}
    return {**kept, "PATH": os.pathsep.join(folders), **caches, **env}


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def turn_of(clone: Clone, kernels: Sequence[str], *, steps: int) -> Turn:
    """Set up, then compile as often as needed."""
    seconds, line = clone.first_loss(steps)
    build = [str(clone.root / ".venv/bin/python"), "setup.py", "--quiet", "build_ext", "--inplace"]
    costs = {}
    for isa in ("all", "native"):  # what is left is for the machine at hand
        remove_build(clone.root)
        costs[isa] = clone.run(build, MOETRAIN_BUILD_ISA=isa)
    rebuilds = {}
    for kernel in kernels:
        (clone.root / kernel).touch()
        rebuilds[kernel] = clone.run(build, MOETRAIN_BUILD_ISA="native")
    return Turn(seconds, line, costs["native"], costs["all"], rebuilds)


def remove_build(root: Path) -> None:
    shutil.rmtree(root / "build", ignore_errors=True)
    for library in (root / "moetrain").glob("_C.*so"):
        library.unlink()


def ratios(turns: Mapping[str, Sequence[Turn]]) -> dict[str, float]:
    """What the module's docstring lists, of medians over rounds."""
    newer, older = turns["newer"], turns["older"]
    full = median(turn.compile.seconds for turn in older)
    worst = [max((cost.seconds for cost in turn.rebuild.values()), default=0.0) for turn in newer]

    def ratio(of: str) -> float:
        return median(getattr(turn, of).cpu_seconds for turn in newer) / median(
            getattr(turn, of).cpu_seconds for turn in older
        )

    return {
        "first_loss_ratio": median(turn.first_loss_seconds for turn in newer)
        / median(turn.first_loss_seconds for turn in older),
        "compile_cpu_ratio": ratio("compile"),
        "compile_all_cpu_ratio": ratio("compile_all"),
        "rebuild_ratio": median(worst) / full,
    }


def line_of(turn: Turn) -> str:
    words = [f"first loss after {turn.first_loss_seconds:.0f} s", f"compile {turn.compile.seconds:.0f} s"]
    words += [f"CPU {turn.compile.cpu_seconds:.0f} s", f"for all sets CPU {turn.compile_all.cpu_seconds:.0f} s"]
    words += [f"after touching {Path(kernel).name} {cost.seconds:.1f} s" for kernel, cost in turn.rebuild.items()]
    return ", ".join(words)


if __name__ == "__main__":
    main()
