"""`moetrain verify product`: compare every folding with every setting. See ``moetrain.verify.product.prove``.

Exit codes: 0 nothing has failed so far, 1 something has, 2 refused.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from moetrain.cli.files import require_file, write_file
from moetrain.config.errors import require
from moetrain.verify.product.cases import shard_of, units
from moetrain.verify.product.progress import Outcome, Progress, read_outcomes
from moetrain.verify.product.prove import prove
from moetrain.verify.product.summary import as_json, summarise


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    start = time.monotonic()
    options = _parser().parse_args(argv)
    try:
        shard, num_shards = _shard(options.shard)
        require(options.minutes > 0, f"--minutes must be above 0, got {options.minutes}; leave it out for no limit")
        require(options.timeout > 0, f"--timeout must be above 0 seconds, got {options.timeout}")
        require_file("--json", options.json)
        require_file("--progress", None if options.only_summary else options.progress)
        product = list(units())
        if not options.only_summary:
            with Progress(options.progress) as progress:
                finished = prove(
                    shard_of(product, shard, num_shards),
                    progress,
                    timeout_s=options.timeout,
                    deadline=start + 60.0 * options.minutes,
                    retry=options.retry,
                    announce=lambda line: print(line, flush=True),
                )
                print("finished" if finished else "out of time; the same command goes on", flush=True)
        outcomes: dict[str, Outcome] = {}
        for path in (options.progress, *options.also):
            outcomes |= read_outcomes(path)
    except (ValueError, TypeError, OSError) as error:
        sys.stderr.write(f"moetrain verify product: {error}\n")
        return 2
    summary = summarise(product, outcomes)
    print(", ".join(f"{name}: {count}" for name, count in summary["cases"].items()))
    try:
        if options.json is not None:
            write_file("--json", options.json, as_json(summary) + "\n")
    except ValueError as error:
        sys.stderr.write(f"moetrain verify product: {error}\n")
        return 1
    return 1 if summary["failures"] else 0


def _shard(text: str) -> tuple[int, int]:
    numbers = [int(part) if part.isdecimal() else 0 for part in text.split("/")]
    require(
        len(numbers) == 2 and 1 <= numbers[0] <= numbers[1],
        f"--shard must be i/n with i from 1 to n, got {text!r}; 1/1 is the whole product",
    )
    return numbers[0], numbers[1]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moetrain verify product",
        description="Compare every folding of up to 8 ranks, with every setting, with the oracle. Takes hours.",
        epilog="Exit code 0: nothing has failed; 1: something has; 2: refused.",
    )
    add = parser.add_argument
    add("--progress", type=Path, required=True, help="file of outcomes; goes on where it ends")
    add("--shard", default="1/1", metavar="I/N", help="prove every N-th part of the product alone, from the I-th on")
    add("--minutes", type=float, default=float("inf"), help="end after so long, to go on another time")
    add("--retry", action="store_true", help="try cases again that did not finish")
    add("--timeout", type=float, default=120.0, help="seconds after which a silent rank ends its case")
    add("--also", type=Path, action="extend", nargs="+", default=[], help="other shards' files, for the summary")
    add("--only-summary", action="store_true", help="run nothing")
    add("--json", type=Path, help="write a summary here")
    return parser
