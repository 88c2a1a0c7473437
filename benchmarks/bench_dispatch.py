"""Our dispatch (a token once per destination rank) against two usual forms, over local gloo ranks.

    python benchmarks/bench_dispatch.py --json out.json

- "K copies": a row for every chosen expert travels there and back (all-to-all of permuted rows, sorted by expert on
  arrival, weighted at home), as most frameworks do.
- "two levels": ours, but to a node first and inside it from there; where ep is a multiple of `--ranks-per-node` and
  more than it.
- "all-gather": every rank gets all tokens, computes its experts' share, and the shares are reduce-scattered; by the
  library's collectives, and by messages between pairs of ranks, of which the faster counts.

Experts only scale their rows, so that what is timed is movement and bookkeeping, forward and backward. All give the
same numbers, which is checked first. Rows are those that leave a rank, summed over ranks, there and back in the
forward pass; bytes include metadata and weights. `payload_row_ratio` and `time_ratio` are ours over K copies': below 1
is better. Times are the slowest rank's, medians over alternating turns; on a machine with fewer cores than ranks they
say what the work costs, not what a network would. Bytes between nodes are those that leave the sender's node, nodes
being consecutive ranks; nothing is slower between them here, so two levels can win bytes only, not time.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from local_ranks import on_local_ranks
from timing import RESULTS, machine
from torch import Tensor

from moetrain.mesh.collectives import (
    all_to_all_rows,
    exchange_counts,
    gather_rows_of_all,
    sum_rows_of_all,
)
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.mesh.tensor_parallel import TensorParallel
from moetrain.mesh.traffic import TrafficCounter
from moetrain.moe.dispatch.all_to_all import make_dispatcher
from moetrain.moe.dispatch.contract import ExpertRows
from moetrain.moe.routing import Routing
from moetrain.ops import gather_rows, group_pairs, plan_receives, route, scatter_add_rows
from moetrain.placement.static import plan_static

Form = Callable[[Tensor, Routing], Tensor]
Found = tuple[dict[str, list[float]], dict[str, dict[str, int]]]  # seconds and traffic by form
Start = Callable[[int, list["Case"], int], list[list[Found]]]  # ranks, cases, rounds; what each rank found


@dataclass(frozen=True, slots=True)
class Case:
    """One setting: what is routed where."""

    ep: int
    top_k: int
    skew: float  # exponent of Zipf's law that experts' popularity follows; 0 is uniform
    num_tokens: int
    width: int
    num_experts: int
    per_node: int  # ranks of a node

    @property
    def has_nodes(self) -> bool:
        """Whether two levels differ from one."""
        return 1 < self.per_node < self.ep and self.ep % self.per_node == 0


class Forms:
    """The ways on one rank."""

    def __init__(self, case: Case, groups: MeshGroups, groups_by_node: MeshGroups | None) -> None:
        self.case = case
        self.ep = groups.group("ep")
        self.placement = plan_static(groups.mesh, case.num_experts)
        self.experts = self.placement.experts_of(groups.pool_rank)
        first = [len(self.placement.experts_of(rank)) for rank in range(case.ep)]
        self.per_rank = first
        self.counter = TrafficCounter(ranks_per_node=case.per_node)
        # For blocks of equal size: the process group's own all-gather and reduce-scatter.
        self.library = TensorParallel(self.ep, self.ep.rank(), self.counter)
        self.direct = make_dispatcher(self.placement, groups, self.counter)
        self.by_node = None
        if groups_by_node is not None:
            self.by_node = make_dispatcher(self.placement, groups_by_node, self.counter)

    def ours(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """A token once per rank, weighted there."""
        return self.direct.dispatch(x_TD, routing, torch.zeros(1, dtype=torch.int32)).combine(self._experts)

    def two_levels(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """A token once per node, and from there once per rank."""
        assert self.by_node is not None
        return self.by_node.dispatch(x_TD, routing, torch.zeros(1, dtype=torch.int32)).combine(self._experts)

    def _experts(self, rows: ExpertRows) -> Tensor:
        weight_N = rows.weight_N * self._scales(rows.offset_e1, rows.weight_N.shape[0])
        pairs_ND = gather_rows(rows.x_RD, rows.row_N, rows.offset_e1)
        return scatter_add_rows(pairs_ND, rows.row_N, weight_N, rows.offset_e1, num_rows=rows.x_RD.shape[0])

    def k_copies(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """A row per pair there and back."""
        num_pairs = int(routing.offset_E1[-1])
        pairs_WE = torch.zeros(self.case.ep, 2 + max(self.per_rank), dtype=torch.int64)
        counts = routing.offset_E1.diff().split(self.per_rank)
        for rank, count in enumerate(counts):
            pairs_WE[rank, 2 : 2 + len(count)] = count
            pairs_WE[rank, 0] = count.sum()
        received_WE = exchange_counts(pairs_WE, self.ep)
        send, recv = pairs_WE[:, 0].tolist(), received_WE[:, 0].tolist()
        sent_ND = gather_rows(x_TD, routing.token_N[:num_pairs])
        got_ND = all_to_all_rows(sent_ND, send, recv, self.ep, counter=self.counter)
        row_N = torch.cat([torch.arange(count, dtype=torch.int32) for count in recv])
        order_N, _, offset_e1 = plan_receives(row_N, received_WE, len(self.experts))
        sorted_ND = gather_rows(got_ND, order_N)
        y_ND = sorted_ND * self._scales(offset_e1, len(order_N))[:, None].to(sorted_ND.dtype)
        home_ND = scatter_add_rows(y_ND, order_N, num_rows=len(order_N))  # back to the order of sources
        home_ND = all_to_all_rows(home_ND, recv, send, self.ep, counter=self.counter, purpose="combine")
        weight_N = routing.weight_N[:num_pairs]
        return scatter_add_rows(home_ND, routing.token_N[:num_pairs], weight_N, num_rows=routing.num_tokens)

    def all_gather(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Everybody gets everything, by the library's collectives."""
        return self._everywhere(x_TD, routing, self.library.gather, self.library.scatter_sum)

    def all_gather_by_pairs(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """The same by messages between pairs of ranks."""
        counts = [routing.num_tokens] * self.case.ep
        gather = partial(gather_rows_of_all, group=self.ep, counter=self.counter, purpose="dispatch")
        home = partial(sum_rows_of_all, counts=counts, group=self.ep, counter=self.counter, purpose="combine")
        return self._everywhere(x_TD, routing, lambda x_TD, _: gather(x_TD, counts), home)

    def _everywhere(
        self,
        x_TD: Tensor,
        routing: Routing,
        gather: Callable[[Tensor, int], Tensor],
        scatter_sum: Callable[[Tensor], Tensor],
    ) -> Tensor:
        rank = self.ep.rank()
        num_pairs = int(routing.offset_E1[-1])
        expert_N = torch.repeat_interleave(routing.offset_E1.diff().long(), output_size=num_pairs)
        mine = torch.stack((routing.token_N[:num_pairs] + rank * routing.num_tokens, expert_N.int()), dim=1)
        sizes = [self.case.top_k * routing.num_tokens] * self.case.ep
        pairs_N2 = gather_rows_of_all(mine, sizes, self.ep, counter=self.counter, purpose="pairs")
        weight_N1 = gather_rows_of_all(
            routing.weight_N[:, None], sizes, self.ep, counter=self.counter, purpose="weights"
        )
        x_AD = gather(x_TD, routing.num_tokens * self.case.ep)
        local_N = pairs_N2[:, 1] - self.experts[0]
        local_N = torch.where((local_N >= 0) & (local_N < len(self.experts)), local_N, -1)
        place_N, offset_e1 = group_pairs(local_N, len(self.experts))
        place_N = place_N[: int(offset_e1[-1])]
        row_N = pairs_N2[:, 0].index_select(0, place_N).contiguous()
        weight_N = gather_rows(weight_N1, place_N).squeeze(1) * self._scales(offset_e1, len(place_N))
        y_AD = scatter_add_rows(gather_rows(x_AD, row_N), row_N, weight_N, num_rows=x_AD.shape[0])
        return scatter_sum(y_AD)

    def _scales(self, offset_e1: Tensor, capacity: int) -> Tensor:
        """float32 [N]: what the expert of each pair multiplies by."""
        scale_e = 1 + torch.tensor(self.experts, dtype=torch.float32) / self.case.num_experts
        count_e = offset_e1.diff().long()
        scale_N = torch.repeat_interleave(scale_e, count_e)
        return torch.nn.functional.pad(scale_N, (0, capacity - len(scale_N)))


def routing_of(case: Case, rank: int) -> Routing:
    """Choices by popularity: Gumbel noise over Zipf's law."""
    random = torch.Generator().manual_seed(17 + rank)
    popularity_E = -case.skew * torch.log(1 + torch.arange(case.num_experts, dtype=torch.float32))
    order_E = torch.randperm(case.num_experts, generator=torch.Generator().manual_seed(3))
    noise_TE = -torch.empty(case.num_tokens, case.num_experts).exponential_(generator=random).log()
    routed = route(noise_TE + popularity_E[order_E], case.top_k)
    gid_T2 = torch.arange(2 * case.num_tokens).view(-1, 2)
    return Routing(routed.token_N, routed.weight_N.clone(), routed.offset_E1, gid_T2, case.num_tokens)


def start_processes(world: int, cases: list[Case], rounds: int) -> list[list[Found]]:
    """What each of ``world`` new processes found of each case."""
    return on_local_ranks(world, all_cases, cases, rounds)


def all_cases(rank: int, cases: list[Case], rounds: int) -> list[Found]:
    """On a rank of an initialised group."""
    found = []
    for case in cases:
        found.append(one_case(case, rank, rounds))
        if rank == 0:
            print(f"ep {case.ep}, K {case.top_k}, skew {case.skew}: done", file=sys.stderr, flush=True)
    return found


def one_case(case: Case, rank: int, rounds: int) -> Found:
    """This rank's seconds and traffic by form."""
    mesh = FoldedMesh(dp_shard=case.ep, ep=case.ep, ranks_per_node=case.per_node)
    groups = MeshGroups.create(mesh)
    by_node = MeshGroups.create(replace(mesh, two_level=True)) if case.has_nodes else None
    forms = Forms(case, groups, by_node)
    ways: dict[str, Form] = {
        "moetrain": forms.ours,
        "K copies": forms.k_copies,
        "all-gather": forms.all_gather,
        "all-gather by pairs": forms.all_gather_by_pairs,
    }
    if by_node is not None:
        ways["two levels"] = forms.two_levels
    routing = routing_of(case, rank)
    x_TD = torch.randn(case.num_tokens, case.width, generator=torch.Generator().manual_seed(rank))
    dy_TD = torch.randn(case.num_tokens, case.width, generator=torch.Generator().manual_seed(99 + rank))
    outcomes, traffic = {}, {}
    for name, way in ways.items():
        forms.counter.reset()
        outcomes[name] = run(way, x_TD, dy_TD, routing)
        traffic[name] = forward_traffic(forms.counter)
    for name in ways:
        for got, want in zip(outcomes[name], outcomes["K copies"], strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6 * float(want.abs().max()))
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            dist.barrier()
            start = time.perf_counter()
            run(way, x_TD, dy_TD, routing)
            taken[name].append(time.perf_counter() - start)
    for made in (by_node, groups):
        if made is not None:
            made.close()
    return taken, traffic


def run(way: Form, x_TD: Tensor, dy_TD: Tensor, routing: Routing) -> tuple[Tensor, ...]:
    """Forward and backward: y, dx, dweight."""
    x_TD, weight_N = x_TD.detach().requires_grad_(), routing.weight_N.detach().requires_grad_()
    fresh = Routing(routing.token_N, weight_N, routing.offset_E1, routing.token_gid_T2, routing.num_tokens)
    y_TD = way(x_TD, fresh)
    y_TD.backward(dy_TD)
    assert x_TD.grad is not None
    assert weight_N.grad is not None
    return y_TD.detach(), x_TD.grad, weight_N.grad


def forward_traffic(counter: TrafficCounter) -> dict[str, int]:
    """Rows there and back (of every hop), and all bytes, of the forward pass."""

    def total(counts: dict[str, int], *purposes: str) -> int:
        return sum(
            count
            for purpose, count in counts.items()
            if not purpose.endswith("_grad") and (not purposes or purpose.removesuffix("_inside") in purposes)
        )

    return {
        "rows": total(counter.rows, "dispatch", "combine", "tp_gather", "tp_scatter"),
        "bytes": total(counter.bytes),
        "between_nodes": total(counter.between_nodes),
        "rows_between_nodes": total(counter.between_nodes, "dispatch", "combine", "tp_gather", "tp_scatter"),
    }


def measure(cases: list[Case], rounds: int, start: Start = start_processes) -> list[dict[str, object]]:
    """Cases of one ep, on as many ranks, which ``start`` provides."""
    of_ranks = start(cases[0].ep, cases, rounds)
    return [summary(case, [found[index] for found in of_ranks]) for index, case in enumerate(cases)]


def summary(case: Case, everyone: list[Found]) -> dict[str, object]:
    """One case, from what each rank found."""
    names = list(everyone[0][0])
    slowest = {name: [max(times) for times in zip(*(one[0][name] for one in everyone), strict=True)] for name in names}
    ms = {name: median(slowest[name]) * 1e3 for name in names}
    rows = {name: sum(one[1][name]["rows"] for one in everyone) for name in names}
    sent = {name: sum(one[1][name]["bytes"] for one in everyone) for name in names}
    crossing = {name: sum(one[1][name]["between_nodes"] for one in everyone) for name in names}
    by_node = "two levels" in names
    all_gather = min(ms["all-gather"], ms["all-gather by pairs"])
    return {
        **asdict(case),
        "median_ms": ms,
        "payload_rows": rows,
        "bytes": sent,
        "bytes_between_nodes": crossing,
        "row_bytes_between_nodes": {
            name: sum(one[1][name]["rows_between_nodes"] for one in everyone) for name in names
        },
        "payload_row_ratio": rows["moetrain"] / rows["K copies"],
        "byte_ratio": sent["moetrain"] / sent["K copies"],
        "time_ratio": ms["moetrain"] / ms["K copies"],
        "time_ratio_all_gather": ms["moetrain"] / all_gather,
        "two_level_crossing_ratio": crossing["two levels"] / crossing["moetrain"] if by_node else None,
        "two_level_time_ratio": ms["two levels"] / ms["moetrain"] if by_node else None,
    }


def table(results: list[dict[str, Any]]) -> str:
    head = ["ep", "K", "skew", "rows / K copies", "bytes / K copies", "rows / all-gather", "ours, ms", "K copies, ms",
            "all-gather, ms", "by pairs, ms", "time / K copies", "time / all-gather",
            "two levels: bytes between nodes / ours", "two levels: time / ours"]  # fmt: skip
    lines = [head, ["---:"] * len(head)]
    for one in results:
        ms, rows = one["median_ms"], one["payload_rows"]
        ratios = (one["payload_row_ratio"], one["byte_ratio"], rows["moetrain"] / rows["all-gather"])
        cells = [
            one["ep"],
            one["top_k"],
            one["skew"],
            *ratios,
            *(ms[name] for name in ("moetrain", "K copies", "all-gather", "all-gather by pairs")),
        ]
        cells += [one["time_ratio"], one["time_ratio_all_gather"]]
        cells += [one["two_level_crossing_ratio"] or "", one["two_level_time_ratio"] or ""]
        lines.append([f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ep", type=int, nargs="+", default=[2, 4])
    add("--top-k", type=int, nargs="+", default=[1, 2, 4, 8])
    add("--skew", type=float, nargs="+", default=[0.0, 1.0])
    add("--tokens", type=int, default=1024, help="of each rank")
    add("--width", type=int, default=512)
    add("--experts", type=int, default=64)
    add("--ranks-per-node", type=int, default=2)
    add("--rounds", type=int, default=7)
    add("--json", type=Path)
    add("--save-as", metavar="HARDWARE", help="also write results/dispatch_HARDWARE_YYYYMM.{json,md}")
    chosen = parser.parse_args()
    sizes = (chosen.tokens, chosen.width, chosen.experts, chosen.ranks_per_node)
    where = machine()  # now: its load is not that of what is measured
    results = []
    for ep in chosen.ep:
        cases = [Case(ep, top_k, skew, *sizes) for top_k in chosen.top_k for skew in chosen.skew]
        results += measure(cases, chosen.rounds)
    text = "\n".join(["# dispatch", "", *(f"- {key}: {value}" for key, value in where.items()), "", table(results), ""])
    sys.stdout.write(text)
    written = json.dumps({"machine": where, "results": results}, indent=1)
    if chosen.json is not None:
        chosen.json.write_text(written)
    if chosen.save_as:
        stem = RESULTS / f"dispatch_{chosen.save_as}_{time.strftime('%Y%m')}"
        stem.with_suffix(".json").write_text(written)
        stem.with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
