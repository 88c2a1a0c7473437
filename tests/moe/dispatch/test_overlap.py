"""What dispatch does meanwhile, and what it never does: wait for the host where nothing has to be counted."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from known import world_group
from moe.dispatch.helpers import COMPOSED, Mode, destinations_of, make_groups, spread_layer
from moe.helpers import WIDTH, context, make_moe, tokens
from ranks import run_on_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moetrain.mesh import collectives
from moetrain.moe import Padding, Routing
from moetrain.moe import experts as experts_module
from moetrain.moe import layer as layer_module
from moetrain.moe.dispatch import direct as direct_module
from moetrain.moe.dispatch import groups as groups_module
from moetrain.moe.dispatch import padded as padded_module
from moetrain.moe.dispatch import plan as plan_module
from moetrain.moe.dispatch import transport as transport_module
from moetrain.moe.dispatch import two_level as two_level_module
from moetrain.moe.dispatch.destinations import Destinations
from moetrain.moe.dispatch.groups import DispatchGroups
from moetrain.moe.dispatch.seats import NodeDestinations
from moetrain.moe.experts import SharedExpert
from moetrain.moe.rules import capacity as capacity_module
from moetrain.moe.rules.capacity import rows_within_capacity
from moetrain.ops import plan_rows as plan_ops


class _Noted:
    """A piece of work that says when it is waited for."""

    def __init__(self, work: dist.Work | None, events: list[str]) -> None:
        self._work, self._events = work, events

    def wait(self) -> None:
        self._events.append("wait")
        assert self._work is not None
        self._work.wait()


class _Marked(torch.autograd.Function):
    """Says when it runs, in both directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, events: list[str]) -> Tensor:
        ctx.name, ctx.events = name, events
        events.append(name)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.events.append(ctx.name)
        return grad, None, None


def layer_body(rank: int, pieces: int) -> list[str]:
    """The order in which one layer with a shared expert starts exchanges of rows, computes, and waits."""
    events: list[str] = []
    start, shared_forward, run_experts = (
        collectives._start_exchange,
        SharedExpert.forward,
        experts_module.run_experts,
    )

    def noted(*args: Any) -> tuple[Tensor, dist.Work | None]:
        rows_RD, work = start(*args)
        if rows_RD.dim() < 2 or rows_RD.shape[1] != WIDTH:
            return rows_RD, work
        events.append("start")
        return rows_RD, _Noted(work, events)  # type: ignore[return-value]

    def shared(self: Any, x_TD: Tensor, *args: Any) -> Tensor:
        return shared_forward(self, _Marked.apply(x_TD, "shared", events), *args)

    def routed(x_RD: Tensor, *args: Any) -> Tensor:
        return run_experts(_Marked.apply(x_RD, "experts", events), *args)

    groups, config = make_groups(Mode()), make_moe(shared_width=3)
    try:
        layer, _, _ = spread_layer(groups, config, pieces=pieces)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(collectives, "_start_exchange", noted)
            patch.setattr(SharedExpert, "forward", shared)
            patch.setattr(layer_module, "run_experts", routed)
            y_TD, aux = layer(tokens(4), context(4))
            events.append("backward")
            (y_TD.sum() + aux).backward()
        return events
    finally:
        groups.close()


@pytest.mark.dist
@pytest.mark.parametrize("pieces", [1, 2])
def test_rows_move_while_the_shared_expert_and_other_pieces_compute_forward_and_backward(pieces: int) -> None:
    middle = ["wait", "experts", "start"] * pieces
    forward = ["start"] * pieces + ["shared"] + middle + ["wait"] * pieces
    backward = ["start"] * pieces + middle + ["shared"] + ["wait"] * pieces
    for events in run_on_ranks(2, layer_body, pieces):
        assert events == [*forward, "backward", *backward]


def twice_body(rank: int) -> str:
    pending = collectives.start_all_to_all_rows(torch.ones(2, 1), [1, 1], [1, 1], world_group())
    pending.wait()
    try:
        pending.wait()
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.dist
def test_rows_are_handed_out_once() -> None:
    for text in run_on_ranks(2, twice_body):
        assert "keep what the first call returned" in text


class _Group:
    """As much of a process group as planning needs where nothing really moves."""

    def __init__(self, size: int, rank: int = 1) -> None:
        self._size, self._rank = size, rank

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank


class _NothingComes:
    """Stands for numbers that were read once: all zero."""

    def __init__(self, packed: list[Tensor]) -> None:
        assert all(numbers.device.type == "meta" for numbers in packed)

    def take(self, count: int) -> list[int]:
        return [0] * count

    def split(self, size: int) -> plan_module.Split:
        return plan_module.Split([0] * size, [0] * size)


KINDS = [(name, etp) for name in ("direct", "two levels", "padded", "padded, two levels") for etp in (1, 2)]


def plan_without_values(monkeypatch: pytest.MonkeyPatch, kind: str, etp: int) -> list[plan_module.DispatchPlan]:
    """Plan on tensors that have no values, so that whatever asks for one raises."""

    def moved(x_RD: Tensor, send: list[int], recv: list[int], *args: Any, **options: Any) -> Any:
        return collectives.PendingRows(x_RD.new_empty(sum(recv), *x_RD.shape[1:]), None)

    def gathered(x_RD: Tensor, counts: list[int], *args: Any, **options: Any) -> Tensor:
        return x_RD.new_empty(sum(counts), *x_RD.shape[1:])

    monkeypatch.setattr(groups_module, "start_all_to_all_rows", moved)
    monkeypatch.setattr(groups_module, "gather_rows_of_all", gathered)
    monkeypatch.setattr(groups_module, "exchange_counts", lambda counts, group, **options: torch.empty_like(counts))
    device = torch.device("meta")
    etp_group = _Group(etp) if etp > 1 else None
    groups = DispatchGroups(_Group(4), etp_group, _Group(4 * etp))  # type: ignore[arg-type]
    direct = destinations_of([0, 0, 1, 2, 3, 3], [[0, 1], [2], [3], [4, 5]], 1, device)
    to: Destinations | NodeDestinations = direct
    if "two levels" in kind:
        halves = (_Group(2, 0), _Group(2, 1))
        groups = DispatchGroups(groups.ep, groups.etp, groups.counts, *halves)  # type: ignore[arg-type]
        nodes = destinations_of([0, 0, 0, 1, 1, 1], [[0, 1, 2], [3, 4, 5]], 0, device)
        inside = destinations_of([0, 0, 1], [[0, 1], [2]], 1, device)
        to = NodeDestinations(direct, nodes, inside)
    routing = Routing(
        token_N=torch.empty(20, dtype=torch.int32, device=device),
        weight_N=torch.empty(20, device=device),
        offset_E1=torch.empty(7, dtype=torch.int32, device=device),
        token_gid_T2=torch.empty(10, 2, dtype=torch.int64, device=device),
        num_tokens=10,
        limit=5,
    )
    bad_1 = torch.zeros(1, dtype=torch.int32, device=device)
    if "padded" in kind:
        return padded_module.plan_padded([routing] * 2, to, groups, Padding(10, 5))
    if isinstance(to, NodeDestinations):
        return two_level_module.plan_two_level([routing] * 2, to, bad_1, groups)
    return direct_module.plan_direct([routing] * 2, to, bad_1, groups)


@pytest.mark.parametrize(("kind", "etp"), KINDS)
def test_planning_reads_the_device_once_and_padded_planning_never(
    kind: str, etp: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "padded" not in kind:
        with pytest.raises((RuntimeError, NotImplementedError), match=r"meta|Meta"):
            plan_without_values(monkeypatch, kind, etp)
        for module in (direct_module, two_level_module):
            monkeypatch.setattr(module, "HostNumbers", _NothingComes)
    for plan in plan_without_values(monkeypatch, kind, etp):
        assert plan.offset_e1.shape == (2,)  # one expert here
        if kind == "padded":
            pairs = 2 * 5  # two experts at most on a rank; five tokens in each of two pieces
            assert (plan.etp_rows, plan.etp_pairs) == ([4 * 5] * etp, [4 * pairs] * etp)
            assert plan.row_P.shape == (4 * pairs * etp,)


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device: single values, and shapes that depend on values."""

    WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.WAITS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def reading_body(rank: int, mode: Mode, etp: int, options: dict[str, Any], spoil: str) -> list[str]:
    """What a layer reads of its tensors, forward and backward; ``spoil``: a read more, in capacity or on the way."""
    config = make_moe(shared_width=3, **options)
    groups = make_groups(mode, etp)
    tolist, drop, start = Tensor.tolist, capacity_module.drop_beyond_capacity, transport_module.PlannedPiece._start
    reads = Reads()

    def listed(self: Tensor) -> list[Any]:
        reads.found.append("tolist")
        return tolist(self)

    def dropped(routing: Routing, *args: Any) -> Any:
        int(routing.offset_E1[-1])
        return drop(routing, *args)

    def started(self: Any, hop: Any, x_RD: Tensor, *args: Any) -> Any:
        x_RD.detach().sum().tolist()
        return start(self, hop, x_RD, *args)

    try:
        padding = Padding(4, rows_within_capacity(config, 4)) if mode.padded else None
        layer, _, _ = spread_layer(groups, config, pieces=mode.pieces, padding=padding)
        with pytest.MonkeyPatch.context() as patch, reads:
            patch.setattr(Tensor, "tolist", listed)
            if mode.composed:
                patch.setattr(plan_ops, "OPS", COMPOSED)
            if spoil == "capacity":
                patch.setattr(capacity_module, "drop_beyond_capacity", dropped)
            elif spoil == "transport":
                patch.setattr(transport_module.PlannedPiece, "_start", started)
            y_TD, aux = layer(tokens(4), context(4))
            (y_TD.sum() + aux).backward()
        return reads.found
    finally:
        groups.close()


CAPACITY = {"capacity_factor": 1.0}
READING = [
    (Mode(), 1, {}),
    (Mode(pieces=2), 2, CAPACITY),
    (Mode(per_node=2), 1, CAPACITY),
    (Mode(per_node=2, pieces=2), 2, {}),
    (Mode(composed=True), 1, {"rounding": "nearest", "tile": 4}),
    (Mode(padded=True), 1, CAPACITY),
    (Mode(padded=True, pieces=2, per_node=2), 1, CAPACITY),
    (Mode(padded=True, composed=True), 2, CAPACITY),
]


@pytest.mark.dist
@pytest.mark.parametrize(("mode", "etp", "options"), READING, ids=str)
def test_a_layer_reads_once_and_a_padded_one_never(mode: Mode, etp: int, options: dict[str, Any]) -> None:
    """Router, capacity, rounding, experts and combine included."""
    for found in run_on_ranks(4, reading_body, mode, etp, options, ""):
        assert found == ([] if mode.padded else ["tolist"])


@pytest.mark.dist
@pytest.mark.parametrize("spoil", ["capacity", "transport"])
def test_a_read_more_would_show(spoil: str) -> None:
    for found in run_on_ranks(4, reading_body, Mode(), 1, CAPACITY, spoil):
        assert len(found) > 1


def bad_body(rank: int, mode: Mode, etp: int) -> str:
    """What a layer says of bad logits on rank 2 of four."""
    config = make_moe()
    groups = make_groups(mode, etp)
    try:
        layer, _, _ = spread_layer(groups, config, pieces=mode.pieces)
        x_TD = tokens(4).detach()
        if rank == 2:
            x_TD[1, 0] = float("inf")
        layer(x_TD, context(4))
    except FloatingPointError as error:
        return str(error)
    finally:
        groups.close()
    return "no error"


@pytest.mark.dist
@pytest.mark.parametrize(
    ("mode", "etp"),
    [(Mode(), 1), (Mode(pieces=2), 1), (Mode(per_node=2), 1), (Mode(), 2), (Mode(per_node=2), 2)],
    ids=str,
)
def test_every_rank_names_the_rank_with_bad_logits_in_every_counted_mode(mode: Mode, etp: int) -> None:
    for text in run_on_ranks(4, bad_body, mode, etp):
        assert text.startswith("MoE layer 3: router logits hold NaN or Inf on rank(s) [2]")
