"""Operators that mostly move memory, against a copy of as many bytes in the same run.

    python benchmarks/bench_bandwidth.py --threads 1
    python benchmarks/bench_bandwidth.py --device cuda --save-as my-gpu

Bytes are those that a call asks for: each row or chunk read once for each use, each result written once, indices too.
A copy of n bytes reads half and writes half. Both take turns; the share is the copy's time over the operator's. The
target on GPUs is 85 % for gathering and aggregation. Answers are checked before anything is timed.

On the CPU an operator's result may be mapped anew, page by page, at each call, where a copy's target is not; with
MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ at a gigabyte it is not either.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from timing import RESULTS, compare, machine
from torch import Tensor

from moetrain.ops import gather_rows, group_pairs, route, scatter_add_rows
from moetrain.ops.chunks import add_sources, chunk_table, pack_chunks, unpack_chunks
from moetrain.ops.reference_scatter_add_rows import scatter_add_rows_reference

TARGETS = {"gather_rows": 0.85, "scatter_add_rows": 0.85}
NUM_SOURCES = 4
ENOUGH_MS = 4.0  # of calls in a row per turn, so that the clock and the launch of the first weigh little


@dataclass(frozen=True, slots=True)
class Sizes:
    """T tokens, D width, E experts, K per token; C chunks of L elements."""

    T: int
    D: int
    E: int
    K: int
    C: int
    L: int


SIZES = {"cpu": Sizes(4096, 512, 64, 8, 64, 1 << 17), "cuda": Sizes(32768, 4096, 128, 8, 128, 3 << 20)}


@dataclass(frozen=True, slots=True)
class Move:
    """One operator: what it is called on, the bytes that asks for, and whether its answer is right."""

    name: str
    num_bytes: int
    call: Callable[[], object]
    is_right: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Result:
    """Of one call each."""

    case: str
    num_bytes: int
    ms: float
    copy_ms: float
    share: float
    target: float | None

    @property
    def line(self) -> str:
        gbps, copy_gbps = self.num_bytes / self.ms / 1e6, self.num_bytes / self.copy_ms / 1e6
        goal = "" if self.target is None else f"{self.target:.0%}"
        return (
            f"| {self.case} | {self.num_bytes / 1e6:.1f} | {self.ms:.4f} | {gbps:.1f} | {copy_gbps:.1f} "
            f"| {self.share:.0%} | {goal} |"
        )


HEAD = ("| case | MB | ms | GB/s | copy, GB/s | share | target |", "|---|---:|---:|---:|---:|---:|---:|")


def row_moves(sizes: Sizes, dtype: torch.dtype, device: str) -> Iterator[Move]:
    """Tokens to pairs of token and expert, and back."""
    random = torch.Generator(device).manual_seed(0)
    T, D, E, K = sizes.T, sizes.D, sizes.E, sizes.K
    x_TD = torch.randn(T, D, generator=random, device=device).to(dtype)
    expert_id_TK = torch.rand(T, E, generator=random, device=device).topk(K).indices.to(torch.int32)
    pair_N, _ = group_pairs(expert_id_TK.flatten(), E)
    token_N = torch.div(pair_N, K, rounding_mode="floor")
    y_ND, weight_N = gather_rows(x_TD, token_N), torch.rand(T * K, generator=random, device=device)

    def sums_right() -> bool:
        ours = scatter_add_rows(y_ND, token_N, weight_N, num_rows=T).float()
        wanted = scatter_add_rows_reference(y_ND.float(), token_N, weight_N, num_rows=T)
        return bool((ours - wanted).abs().max() <= 2 * torch.finfo(dtype).eps * wanted.abs().max())

    yield Move(
        "gather_rows",
        2 * y_ND.nbytes + token_N.nbytes,
        lambda: gather_rows(x_TD, token_N),
        lambda: torch.equal(y_ND, x_TD[token_N.long()]),
    )
    yield Move(
        "scatter_add_rows",
        y_ND.nbytes + x_TD.nbytes + token_N.nbytes + weight_N.nbytes,
        lambda: scatter_add_rows(y_ND, token_N, weight_N, num_rows=T),
        sums_right,
    )


def router_moves(sizes: Sizes, device: str) -> Iterator[Move]:
    """Logits to weights and tokens by expert."""
    random = torch.Generator(device).manual_seed(0)
    logits_TE = torch.randn(sizes.T, sizes.E, generator=random, device=device)
    routed = route(logits_TE, sizes.K)

    def is_right() -> bool:
        """Every token K times, no pair twice, and all with the weights of the K best; ties may go either way."""
        prob_TE, token_N = logits_TE.softmax(-1), routed.token_N.long()
        expert_N = torch.arange(sizes.E, device=device).repeat_interleave(routed.offset_E1.long().diff())
        weight_N = prob_TE[token_N, expert_N] / prob_TE.topk(sizes.K).values.sum(-1)[token_N]
        complete = bool((torch.bincount(token_N, minlength=sizes.T) == sizes.K).all())
        distinct = len((token_N * sizes.E + expert_N).unique()) == sizes.T * sizes.K
        return complete and distinct and torch.allclose(routed.weight_N, weight_N, rtol=1e-4, atol=1e-6)

    results = routed.token_N.nbytes + routed.weight_N.nbytes
    yield Move("route", logits_TE.nbytes + results, lambda: route(logits_TE, sizes.K), is_right)


def chunk_moves(sizes: Sizes, wide: torch.dtype, narrow: torch.dtype, device: str) -> Iterator[Move]:
    """Chunks of parameters that leave, arrive, and are summed: in reverse order, so that nothing is one long copy."""
    C, L = sizes.C, sizes.L
    random = torch.Generator(device).manual_seed(0)
    master = torch.randn(C * L, generator=random, device=device).to(wide)
    sent, arrived = master.to(narrow), torch.empty_like(master)
    sources = [sent, *(torch.randn(C * L, generator=random, device=device).to(narrow) for _ in range(NUM_SOURCES - 1))]
    moved = chunk_table(((c * L, (C - 1 - c) * L, L) for c in range(C)), 3, device)
    summed = chunk_table(((s, c * L, (C - 1 - c) * L, L) for c in range(C) for s in range(NUM_SOURCES)), 4, device)

    def reversed_chunks(x: Tensor) -> Tensor:
        return x.view(C, L).flip(0).flatten()

    def packed(source: Tensor) -> Tensor:
        return pack_chunks(source, moved, C * L, narrow)

    def packs(source: Tensor) -> bool:
        return torch.equal(packed(source), reversed_chunks(sent))

    def unpacked() -> Tensor:
        unpack_chunks(arrived, sent, moved)
        return arrived

    def sum_in_order() -> Tensor:
        total = sources[0].to(wide)
        for source in sources[1:]:
            total += source
        return total

    def added() -> Tensor:
        add_sources(arrived, sources, summed)
        return arrived

    for source in (master, sent):
        yield Move(
            f"pack_chunks, {_name(source.dtype)} to {_name(narrow)}",
            source.nbytes + sent.nbytes,
            partial(packed, source),
            partial(packs, source),
        )
    yield Move(
        f"unpack_chunks, {_name(narrow)} to {_name(wide)}",
        sent.nbytes + arrived.nbytes,
        unpacked,
        lambda: torch.equal(unpacked(), reversed_chunks(sent).to(wide)),
    )
    yield Move(
        f"add_sources, {NUM_SOURCES} x {_name(narrow)} to {_name(wide)}",
        NUM_SOURCES * sent.nbytes + arrived.nbytes,
        added,
        lambda: torch.equal(added(), reversed_chunks(sum_in_order())),
    )


def measure(move: Move, device: str, rounds: int) -> Result:
    """The operator and a copy of as many bytes, in turns.

    Raises:
        ValueError: its answer is wrong.
    """
    if not move.is_right():
        raise ValueError(f"{move.name}: the answer is wrong; nothing was timed")
    source = torch.zeros(move.num_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls = {move.name: move.call, "copy": lambda: target.copy_(source)}
    once = compare("", calls, rounds=1).best_ms
    times = {name: max(1, math.ceil(ENOUGH_MS / ms)) if device != "cpu" else 1 for name, ms in once.items()}
    repeated = {name: _repeat(call, times[name]) for name, call in calls.items()}
    taken = compare(move.name, repeated, rounds=rounds).median_ms
    ms, copy_ms = (taken[name] / times[name] for name in (move.name, "copy"))
    return Result(move.name, move.num_bytes, ms, copy_ms, copy_ms / ms, TARGETS.get(move.name))


def _repeat(call: Callable[[], object], times: int) -> Callable[[], None]:
    def calls() -> None:
        for _ in range(times):
            call()

    return calls


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=11, help="turns of operator and copy")
    parser.add_argument("--threads", type=int, default=None, help="torch threads; its own choice if left out")
    parser.add_argument("--shrink", type=int, default=1, help="tokens and lengths of chunks over this, for a trial")
    parser.add_argument("--save-as", default=None, metavar="TAG", help="writes results/bandwidth_<TAG>_<YYYYMM>.*")
    chosen = parser.parse_args()
    if chosen.threads is not None:
        torch.set_num_threads(chosen.threads)
    full = SIZES[torch.device(chosen.device).type]
    sizes = Sizes(full.T // chosen.shrink, full.D, full.E, full.K, full.C, full.L // chosen.shrink)
    wide, narrow = torch.float32, torch.bfloat16
    results: list[Result] = []
    failed = 0
    print("\n".join(HEAD), flush=True)
    for moves in (
        row_moves(sizes, narrow, chosen.device),
        router_moves(sizes, chosen.device),
        chunk_moves(sizes, wide, narrow, chosen.device),
    ):
        for move in moves:
            try:
                results.append(measure(move, chosen.device, chosen.rounds))
            except (ValueError, RuntimeError) as reason:  # the others are worth measuring still
                print(f"{move.name} is left out: {reason}", file=sys.stderr, flush=True)
                failed += 1
                continue
            print(results[-1].line, flush=True)
            save(results, sizes, chosen.save_as)
    sys.exit(min(failed, 1))


def save(results: list[Result], sizes: Sizes, tag: str | None) -> None:
    """Markdown and JSON, whole after each case."""
    if tag is None:
        return
    RESULTS.mkdir(exist_ok=True)
    malloc = {name: value for name, value in sorted(os.environ.items()) if name.startswith("MALLOC_")}
    where = {**machine(), "sizes": str(asdict(sizes)), "malloc": str(malloc or "default")}
    stem = Path(RESULTS, f"bandwidth_{tag}_{time.strftime('%Y%m')}")
    head = ["# bandwidth", "", *(f"- {key}: {value}" for key, value in where.items()), "", *HEAD]
    stem.with_suffix(".md").write_text("\n".join([*head, *(one.line for one in results), ""]))
    values = {"machine": where, "rows": [asdict(one) for one in results]}
    stem.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
