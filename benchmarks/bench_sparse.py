"""Our sparse collectives of expert chunks against two usual forms, over local gloo ranks.

    python benchmarks/bench_sparse.py --json out.json

- "two levels": ours, but to one rank of each node first; where there is more than one node.
- "batch_isend_irecv": the same messages packed, sent, unpacked and added up by torch from Python.
- "dense": all_gather_into_tensor of all experts, of which each rank takes those that it holds; reduce_scatter_tensor of
  all experts' gradients, zeros where a rank holds none.

Placements: "hot", the most popular experts on every rank; "random", as many others on each; "full", all on all. Masters
are float32, weights travel as bfloat16, gradients as float32. All ways give the same bits (whole numbers), which is
checked first. Times are the slowest rank's, medians over alternating turns, of one gather and one scatter; on a machine
with fewer cores than ranks they say what the work costs, not what a network would. Bytes are those that leave a rank,
summed; the library's own are counted as its rings must send them at least. `time_ratio_batched` and `time_ratio_dense`
are ours over theirs: below 1 is better. Nothing is slower between nodes here: two levels can win bytes only, not time.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from local_ranks import on_local_ranks
from timing import RESULTS, machine
from torch import Tensor

from moetrain.mesh.traffic import TrafficCounter
from moetrain.placement.placement import Placement
from moetrain.placement.sparse import SparseCollectives

PARTS = ("gather", "scatter")

Found = tuple[dict[str, dict[str, list[float]]], dict[str, dict[str, int]]]  # seconds by part and way; bytes by way
Start = Callable[[int, list["Case"], int], list[list[Found]]]  # ranks, cases, rounds; what each rank found


@dataclass(frozen=True, slots=True)
class Case:
    """One setting: what lies where."""

    ranks: int
    pattern: str  # hot, random or full
    num_experts: int
    slots: int  # experts that a rank holds beside its own
    length: int  # elements of an expert
    per_node: int

    def placement(self) -> Placement:
        """Owners in blocks; each rank holds what it owns and what the pattern adds."""
        each = self.num_experts // self.ranks
        draw = random.Random(11)
        holders = [{e // each} for e in range(self.num_experts)]
        for rank in range(self.ranks):
            others = [e for e in range(self.num_experts) if e // each != rank]
            spread = sorted(others, key=lambda e: (e % each, e))  # popular experts have different owners
            added = {"hot": spread[: self.slots], "random": draw.sample(others, self.slots), "full": others}
            for expert in added[self.pattern]:
                holders[expert].add(rank)
        owners = [[e // each] for e in range(self.num_experts)]
        return Placement.of(self.ranks, owners, [sorted(held) for held in holders])


class Way:
    """One way to gather and scatter, on one rank."""

    def __init__(self, case: Case, rank: int) -> None:
        self.case, self.rank = case, rank
        self.placement = case.placement()
        self.experts = list(self.placement.experts_of(rank))
        self.owned = [expert for expert, _ in self.placement.owned_by(rank)]
        self.held_HL = torch.empty(len(self.experts), case.length, dtype=torch.bfloat16)
        self.home_CL = torch.empty(len(self.owned), case.length)

    def gather(self, owned_CL: Tensor) -> Tensor:
        """The held chunks in bfloat16."""
        raise NotImplementedError

    def scatter(self, grad_HL: Tensor) -> Tensor:
        """The owned chunks' sums in float32."""
        raise NotImplementedError

    def num_bytes(self) -> dict[str, int]:
        """What leaves this rank in one gather and one scatter, and what of it leaves its node."""
        raise NotImplementedError


class Sparse(Way):
    """Ours, direct or in two levels."""

    def __init__(self, case: Case, rank: int, ranks_per_node: int | None) -> None:
        super().__init__(case, rank)
        self.counter = TrafficCounter(ranks_per_node=case.per_node)
        self.sparse = SparseCollectives(dist.group.WORLD, rank, self.counter, ranks_per_node=ranks_per_node)
        self.plan = self.sparse.plan(self.placement)

    def gather(self, owned_CL: Tensor) -> Tensor:
        """In one call."""
        self.sparse.all_gather(self.plan, owned_CL, self.held_HL)
        return self.held_HL

    def scatter(self, grad_HL: Tensor) -> Tensor:
        """In one call."""
        self.sparse.reduce_scatter(self.plan, grad_HL, self.home_CL)
        return self.home_CL

    def num_bytes(self) -> dict[str, int]:
        """As counted since the last time."""
        counts = {name: sum(getattr(self.counter, name).values()) for name in ("bytes", "between_nodes")}
        self.counter.reset()
        return counts


class Batched(Way):
    """The direct plan by batch_isend_irecv. Rows that are evenly spaced are taken as a slice, which copies least."""

    def __init__(self, case: Case, rank: int) -> None:
        super().__init__(case, rank)
        each = case.num_experts // case.ranks
        peers = [peer for peer in range(case.ranks) if peer != rank]
        theirs = {peer: set(self.placement.experts_of(peer)) for peer in peers}
        sent = {peer: [row for row, e in enumerate(self.owned) if e in theirs[peer]] for peer in peers}
        got = {peer: [row for row, e in enumerate(self.experts) if e // each == peer] for peer in peers}
        self.num_sent = {peer: len(rows) for peer, rows in sent.items() if rows}
        self.num_got = {peer: len(rows) for peer, rows in got.items() if rows}
        self.sent = {peer: _index(sent[peer]) for peer in self.num_sent}
        self.got = {peer: _index(got[peer]) for peer in self.num_got}
        self.mine = _index([self.experts.index(expert) for expert in self.owned])

    def gather(self, owned_CL: Tensor) -> Tensor:
        """Pack, send, unpack."""
        wire_CL = owned_CL.bfloat16()
        outgoing = {peer: wire_CL[rows].contiguous() for peer, rows in self.sent.items()}
        incoming = self._exchange(outgoing, self.num_got, wire_CL)
        self.held_HL[self.mine] = wire_CL
        for peer, rows in self.got.items():
            self.held_HL[rows] = incoming[peer]
        return self.held_HL

    def scatter(self, grad_HL: Tensor) -> Tensor:
        """Pack, send, add in ascending order of ranks."""
        outgoing = {peer: grad_HL[rows].contiguous() for peer, rows in self.got.items()}
        incoming = self._exchange(outgoing, self.num_sent, grad_HL)
        self.home_CL.zero_()
        for rank in range(self.case.ranks):
            if rank == self.rank:
                self.home_CL += grad_HL[self.mine]
            elif rank in incoming:
                self.home_CL[self.sent[rank]] += incoming[rank]
        return self.home_CL

    def _exchange(self, outgoing: dict[int, Tensor], counts: dict[int, int], like: Tensor) -> dict[int, Tensor]:
        incoming = {peer: like.new_empty(count, self.case.length) for peer, count in counts.items()}
        operations = [dist.P2POp(dist.isend, sent, peer) for peer, sent in outgoing.items()]
        operations += [dist.P2POp(dist.irecv, got, peer) for peer, got in incoming.items()]
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()
        return incoming

    def num_bytes(self) -> dict[str, int]:
        """Its messages'."""
        node = self.rank // self.case.per_node
        sent = [(peer, 2 * count) for peer, count in self.num_sent.items()]
        sent += [(peer, 4 * count) for peer, count in self.num_got.items()]
        crossing = [count for peer, count in sent if peer // self.case.per_node != node]
        return {
            "bytes": sum(count for _, count in sent) * self.case.length,
            "between_nodes": sum(crossing) * self.case.length,
        }


class Dense(Way):
    """The library's own collectives, of all experts."""

    def __init__(self, case: Case, rank: int) -> None:
        super().__init__(case, rank)
        self.all_EL = torch.empty(case.num_experts, case.length, dtype=torch.bfloat16)
        self.index = torch.tensor(self.experts)

    def gather(self, owned_CL: Tensor) -> Tensor:
        """All, of which some are taken."""
        # torch 2.13 deprecates the names that 2.11 has
        library = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        library(self.all_EL, owned_CL.bfloat16())
        torch.index_select(self.all_EL, 0, self.index, out=self.held_HL)
        return self.held_HL

    def scatter(self, grad_HL: Tensor) -> Tensor:
        """Zeros for experts that are not held."""
        grad_EL = torch.zeros(self.case.num_experts, self.case.length)
        grad_EL[self.index] = grad_HL
        library = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        library(self.home_CL, grad_EL)
        return self.home_CL

    def num_bytes(self) -> dict[str, int]:
        """A ring's: every rank hands on all blocks but one; the last of a node's to another node."""
        sent = (self.case.ranks - 1) * len(self.owned) * self.case.length * (2 + 4)
        crosses = (self.rank + 1) % self.case.ranks // self.case.per_node != self.rank // self.case.per_node
        return {"bytes": sent, "between_nodes": sent * crosses}


def _index(rows: list[int]) -> slice | Tensor:
    step = rows[1] - rows[0] if len(rows) > 1 else 1
    even = bool(rows) and rows == list(range(rows[0], rows[-1] + 1, step))
    return slice(rows[0], rows[-1] + 1, step) if even else torch.tensor(rows)


def start_processes(world: int, cases: list[Case], rounds: int) -> list[list[Found]]:
    """What each of ``world`` new processes found of each case."""
    return on_local_ranks(world, all_cases, cases, rounds)


def all_cases(rank: int, cases: list[Case], rounds: int) -> list[Found]:
    """On a rank of an initialised group."""
    return [one_case(case, rank, rounds) for case in cases]


def one_case(case: Case, rank: int, rounds: int) -> Found:
    """This rank's seconds and bytes."""
    ways: dict[str, Way] = {"moetrain": Sparse(case, rank, None)}
    if case.per_node < case.ranks:
        ways["two levels"] = Sparse(case, rank, case.per_node)
    ways |= {"batch_isend_irecv": Batched(case, rank), "dense": Dense(case, rank)}
    first = ways["moetrain"]
    numbers_L = torch.arange(case.length) % 7
    owned_CL = torch.stack([(numbers_L + expert).float() for expert in first.owned])
    grad_HL = torch.stack([(numbers_L * (rank + 1) - expert).float() for expert in first.experts])
    calls = {part: {name: _call(way, part, owned_CL, grad_HL) for name, way in ways.items()} for part in PARTS}
    for part in PARTS:
        wanted = calls[part]["dense"]().clone()
        for name, call in calls[part].items():
            assert torch.equal(call(), wanted), f"{name} answers wrongly"
    for way in (way for way in ways.values() if isinstance(way, Sparse)):
        way.counter.reset()
        way.gather(owned_CL)
        way.scatter(grad_HL)
    sent = {name: way.num_bytes() for name, way in ways.items()}
    taken: dict[str, dict[str, list[float]]] = {part: {name: [] for name in ways} for part in PARTS}
    for _ in range(rounds):
        for part in PARTS:
            for name, call in calls[part].items():
                dist.barrier()
                start = time.perf_counter()
                call()
                taken[part][name].append(time.perf_counter() - start)
    return taken, sent


def _call(way: Way, part: str, owned_CL: Tensor, grad_HL: Tensor) -> Callable[[], Tensor]:
    return (lambda: way.gather(owned_CL)) if part == "gather" else (lambda: way.scatter(grad_HL))


def measure(cases: list[Case], rounds: int, start: Start = start_processes) -> list[dict[str, Any]]:
    """Cases of one number of ranks, which ``start`` provides."""
    of_ranks = start(cases[0].ranks, cases, rounds)
    return [summary(case, [found[index] for found in of_ranks]) for index, case in enumerate(cases)]


def summary(case: Case, everyone: list[Found]) -> dict[str, Any]:
    """One case, from what each rank found."""
    names = list(everyone[0][1])
    ms = {}
    for part in PARTS:
        slowest = {
            name: [max(times) for times in zip(*(taken[part][name] for taken, _ in everyone), strict=True)]
            for name in names
        }
        ms[part] = {name: median(slowest[name]) * 1e3 for name in names}
    totals = {
        kind: {name: sum(sent[name][kind] for _, sent in everyone) for name in names}
        for kind in ("bytes", "between_nodes")
    }
    both = {name: ms["gather"][name] + ms["scatter"][name] for name in names}
    crossing = totals["between_nodes"]
    by_node = "two levels" in names
    return {
        **asdict(case),
        "median_ms": ms,
        **totals,
        "byte_ratio_dense": totals["bytes"]["moetrain"] / totals["bytes"]["dense"],
        "time_ratio_batched": both["moetrain"] / both["batch_isend_irecv"],
        "time_ratio_dense": both["moetrain"] / both["dense"],
        "two_level_crossing_ratio": crossing["two levels"] / crossing["moetrain"] if by_node else None,
        "two_level_time_ratio": both["two levels"] / both["moetrain"] if by_node else None,
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown."""
    head = ["ranks", "placement", "bytes / dense", "gather, ms", "scatter, ms", "time / batch_isend_irecv",
            "time / dense", "two levels: bytes between nodes / ours", "two levels: time / ours"]  # fmt: skip
    lines = [head, ["---:", "---", *["---:"] * (len(head) - 2)]]
    for one in results:
        ours = (one["median_ms"][part]["moetrain"] for part in PARTS)
        cells = [one["ranks"], one["pattern"], one["byte_ratio_dense"], *ours]
        cells += [one["time_ratio_batched"], one["time_ratio_dense"]]
        cells += [one["two_level_crossing_ratio"] or "", one["two_level_time_ratio"] or ""]
        lines.append([f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    """Run the cases of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=int, nargs="+", default=[2, 4])
    add("--pattern", nargs="+", choices=("hot", "random", "full"), default=["hot", "random", "full"])
    add("--experts", type=int, default=16, help="a multiple of each number of ranks")
    add("--slots", type=int, default=2, help="of each rank, beside its own experts")
    add("--length", type=int, default=3 * 256 * 512, help="elements of an expert")
    add("--ranks-per-node", type=int, default=2)
    add("--rounds", type=int, default=15)
    add("--json", type=Path)
    add("--save-as", metavar="HARDWARE", help="also write results/sparse_HARDWARE_YYYYMM.{json,md}")
    chosen = parser.parse_args()
    sizes = (chosen.experts, chosen.slots, chosen.length, chosen.ranks_per_node)
    where = machine()  # now: its load is not that of what is measured
    results = []
    for ranks in chosen.ranks:
        results += measure([Case(ranks, pattern, *sizes) for pattern in chosen.pattern], chosen.rounds)
    text = "\n".join(["# sparse", "", *(f"- {key}: {value}" for key, value in where.items()), "", table(results), ""])
    sys.stdout.write(text)
    written = json.dumps({"machine": where, "results": results}, indent=1)
    if chosen.json is not None:
        chosen.json.write_text(written)
    if chosen.save_as:
        stem = RESULTS / f"sparse_{chosen.save_as}_{time.strftime('%Y%m')}"
        stem.with_suffix(".json").write_text(written)
        stem.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
