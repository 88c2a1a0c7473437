"""Dispatch in pieces, in two levels and padded: equal to the bit with all experts in one place, and what travels.

Small whole numbers, so that no order of sums can matter. Every rank makes all ranks' tokens.
"""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from moe.dispatch_helpers import by_expert, experts, in_one_place, scattered_placement, slice_of
from moe.helpers import (
    WIDTH,
    choices_of,
    context,
    expert_weights,
    integer_routing,
    make_layer,
    make_moe,
    make_params,
    rank_routing,
    tokens,
)
from ranks import run_on_ranks
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moetrain.mesh import collectives
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.mesh.traffic import TrafficCounter
from moetrain.moe import Padding, Routing, make_dispatcher
from moetrain.moe import dispatch_plan as plan_module
from moetrain.moe import padded as padded_module
from moetrain.moe.capacity import rows_within_capacity
from moetrain.moe.dispatch_plan import Destinations, DispatchGroups
from moetrain.placement.placement import Placement
from moetrain.placement.static import plan_static

EXACT = ("y", "dx", "dweight", "dw_in", "dw_out")


@dataclass(frozen=True)
class Mode:
    """How rows travel: ranks of a node for two levels, pieces, and whether messages are padded."""

    per_node: int = 0
    pieces: int = 1
    padded: bool = False


TWO = Mode(per_node=2)
PADDED = Mode(padded=True)


@dataclass(frozen=True)
class Setting:
    """What is routed: tokens of each rank, and where experts are."""

    sizes: tuple[int, ...]
    num_experts: int
    top_k: int
    seed: int = 7
    scattered: bool = False

    def placement(self, groups: MeshGroups) -> Placement:
        if self.scattered:
            return scattered_placement(self.num_experts, self.seed)
        return plan_static(groups.mesh, self.num_experts)

    def routing(self) -> Routing:
        """Of all tokens."""
        return integer_routing(sum(self.sizes), self.num_experts, self.top_k, self.seed)


def make_groups(mode: Mode) -> MeshGroups:
    world = dist.get_world_size()
    two_level = mode.per_node > 0
    return MeshGroups.create(
        FoldedMesh(dp_shard=world, ep=world, ranks_per_node=mode.per_node or 8, two_level=two_level)
    )


def padding_of(setting: Setting) -> Padding:
    """Bounds that hold on all ranks, with room to spare."""
    whole = setting.routing()
    parts = [rank_routing(whole, slice_of(rank, list(setting.sizes))) for rank in range(len(setting.sizes))]
    return Padding(max(setting.sizes) + 1, max(int(part.offset_E1.diff().max()) for part in parts) + 1)


def body(rank: int, setting: Setting, mode: Mode, spoil: str = "") -> dict[str, Any]:
    """What this rank finds, its traffic, and how often it told counts or stopped for the host."""
    sizes = list(setting.sizes)
    params = make_params(make_moe(num_experts=setting.num_experts, top_k=setting.top_k, activation="relu2"))
    params = {name: value.detach().float().round() for name, value in params.items()}
    rng = torch.Generator().manual_seed(setting.seed)
    x_TD = torch.randint(-2, 3, (sum(sizes), WIDTH), generator=rng).float()
    pull_TD = torch.randint(-2, 3, (sum(sizes), WIDTH), generator=rng).float()
    whole, here = setting.routing(), slice_of(rank, sizes)
    padding = padding_of(setting) if mode.padded else None
    groups, counter = make_groups(mode), TrafficCounter(ranks_per_node=mode.per_node or 2)
    calls = {"counts": 0, "copies": 0}
    try:
        placement = setting.placement(groups)
        held = placement.experts_of(rank)
        weights = expert_weights(params, held)
        dispatcher = make_dispatcher(placement, groups, counter, pieces=mode.pieces, padding=padding)
        mine = rank_routing(whole, here)
        limited = replace(mine, limit=padding.limit) if padding else mine
        if spoil == "dropped pair" and rank == 0:
            limited = replace(limited, offset_E1=limited.offset_E1.clamp(max=len(limited.token_N) - 1))
        x_mine_TD = x_TD[here].clone().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            _count_calls(patch, plan_module, "exchange_counts", calls, "counts")
            _count_calls(patch, plan_module.HostNumbers, "__init__", calls, "copies")
            sent = dispatcher.send(x_mine_TD, limited, torch.zeros(1, dtype=torch.int32))
            y_TD = sent.through(experts(weights))
            y_TD.backward(pull_TD[here])

        everything, whole_TD = in_one_place(params, x_TD.requires_grad_(), whole)
        whole_TD.backward(pull_TD)
        assert whole.weight_N.grad is not None
        dweight = rank_routing(replace(whole, weight_N=whole.weight_N.grad), here).weight_N.detach()
        assert mine.weight_N.grad is not None
        assert x_mine_TD.grad is not None
        assert x_TD.grad is not None
        return {
            "y": torch.equal(y_TD, whole_TD[here]),
            "dx": torch.equal(x_mine_TD.grad, x_TD.grad[here]),
            "dweight": torch.equal(mine.weight_N.grad, dweight),
            "dw_in": torch.equal(by_expert(weights, "w_in"), by_expert(everything, "w_in")[list(held)]),
            "dw_out": torch.equal(by_expert(weights, "w_out"), by_expert(everything, "w_out")[list(held)]),
            "destinations": [sorted({placement.destination(rank, e) for e in ids}) for ids in choices_of(mine)],
            "rows": counter.rows,
            "between": counter.between_nodes,
            "bad": sent.bad_ranks,
            **calls,
        }
    finally:
        groups.close()


def _count_calls(patch: pytest.MonkeyPatch, owner: Any, name: str, calls: dict[str, int], key: str) -> None:
    original = getattr(owner, name)

    def counted(*args: Any) -> Any:
        calls[key] += 1
        return original(*args)

    patch.setattr(owner, name, counted)


MODES = {
    "pieces": Mode(pieces=3),
    "two levels": TWO,
    "two levels in pieces": Mode(per_node=2, pieces=2),
    "padded": PADDED,
    "padded in pieces": Mode(padded=True, pieces=2),
    "padded, two levels": Mode(per_node=2, padded=True),
    "padded, two levels in pieces": Mode(per_node=2, padded=True, pieces=3),
}
SETTINGS = [
    Setting((5, 4, 0, 6), 6, 4),
    Setting((5, 4, 3, 6), 2, 2),  # two ranks without experts, which are a node
    Setting((0, 0, 0, 0), 8, 1),
    Setting((1, 0, 0, 0), 9, 9),
]


def assert_exact(found: dict[str, Any]) -> None:
    assert all(found[name] for name in EXACT), found


@pytest.mark.dist
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_equals_one_process_to_the_bit(mode: str, setting: Setting) -> None:
    for found in run_on_ranks(4, body, setting, MODES[mode]):
        assert_exact(found)
        counted = 0 if MODES[mode].padded else 1  # for all pieces together
        assert (found["counts"], found["copies"]) == (counted, counted)
        assert found["bad"] == (None if MODES[mode].padded else ())


@pytest.mark.dist
def test_six_ranks_on_three_nodes_and_on_two() -> None:
    for per_node in (2, 3):
        for found in run_on_ranks(6, body, Setting((3, 1, 0, 4, 2, 5), 11, 5, scattered=True), Mode(per_node=per_node)):
            assert_exact(found)


def random_body(rank: int, seeds: list[int]) -> list[dict[str, Any]]:
    """One random shape, placement and mode per seed."""
    found = []
    for seed in seeds:
        rng = torch.Generator().manual_seed(seed)

        def draw(low: int, high: int, size: int = 1, rng: torch.Generator = rng) -> list[int]:
            return torch.randint(low, high, (size,), generator=rng).tolist()

        num_experts = draw(1, 10)[0]
        setting = Setting(tuple(draw(0, 9, 4)), num_experts, draw(1, num_experts + 1)[0], seed, scattered=True)
        mode = Mode(per_node=2 * draw(0, 2)[0], pieces=draw(1, 4)[0], padded=bool(draw(0, 2)[0]))
        found.append(body(rank, setting, mode))
    return found


@pytest.mark.dist
def test_random_shapes_placements_and_modes_are_equal_to_the_bit() -> None:
    for found in run_on_ranks(4, random_body, list(range(24))):
        for case in found:
            assert_exact(case)


@pytest.mark.dist
@pytest.mark.parametrize("mode", ["pieces", "two levels", "padded"])
def test_a_dropped_pair_shows(mode: str) -> None:
    found = run_on_ranks(4, body, SETTINGS[0], MODES[mode], "dropped pair")
    assert not found[0]["y"]
    assert not all(one["dw_out"] for one in found)


@pytest.mark.dist
def test_two_levels_send_a_token_once_to_each_node_and_once_to_each_rank_there() -> None:
    setting = Setting((6, 5, 7, 4), 8, 4)
    direct, two = (run_on_ranks(4, body, setting, mode) for mode in (Mode(), TWO))
    forwarded, kept = [0] * 4, [0] * 4  # rows that rank r passes on inside its node, and those it uses itself
    for rank, found in enumerate(two):
        nodes = [{to // 2 for to in ranks} for ranks in found["destinations"]]
        assert found["rows"]["dispatch"] == sum(len(one - {rank // 2}) for one in nodes)
        for ranks in found["destinations"]:
            for to in ranks:
                through = to // 2 * 2 + rank % 2
                (kept if to == through else forwarded)[through] += 1
    for rank, found in enumerate(two):
        assert found["rows"]["dispatch_inside"] == forwarded[rank]
        other = rank ^ 1
        assert found["rows"]["combine_inside"] == forwarded[other]
    crossing = [sum(found["between"][name] for found in two) for name in ("dispatch", "combine")]
    assert crossing == [sum(found["rows"]["dispatch"] for found in two) * 4 * WIDTH] * 2
    assert all("dispatch_inside" not in found["between"] for found in two)
    direct_crossing = sum(found["between"]["dispatch"] for found in direct)
    expected = sum(to // 2 != rank // 2 for rank, found in enumerate(direct) for ranks in found["destinations"]
                   for to in ranks)  # fmt: skip
    assert direct_crossing == expected * 4 * WIDTH
    assert crossing[0] < direct_crossing


@pytest.mark.dist
def test_padded_messages_are_as_large_whatever_is_routed() -> None:
    one, other = Setting((5, 4, 0, 6), 6, 4), Setting((5, 4, 0, 6), 6, 4, seed=12)
    padding = padding_of(one)
    assert padding == padding_of(other)
    for setting in (one, other):
        for found in run_on_ranks(4, body, setting, PADDED):
            num_rows = min(padding.num_tokens, 2 * padding.limit)
            assert found["rows"]["dispatch"] == found["rows"]["combine"] == 3 * num_rows
            assert found["rows"]["weights"] == 3 * 2 * padding.limit


def refusal_body(rank: int, limit: int | None, num_tokens: int) -> str:
    groups = make_groups(Mode())
    try:
        padding = Padding(num_tokens=4, limit=3)
        dispatcher = make_dispatcher(plan_static(groups.mesh, 4), groups, padding=padding)
        routing = replace(integer_routing(num_tokens, 4, 2, 0), limit=limit)
        dispatcher.send(torch.zeros(num_tokens, WIDTH), routing, torch.zeros(1, dtype=torch.int32))
    except ValueError as error:
        return str(error)
    finally:
        groups.close()
    return "no error"


@pytest.mark.dist
@pytest.mark.parametrize(("limit", "num_tokens"), [(4, 4), (3, 5)])
def test_what_does_not_fit_padded_messages_is_refused(limit: int, num_tokens: int) -> None:
    for text in run_on_ranks(2, refusal_body, limit, num_tokens):
        assert "made for at most 4 tokens and 3 pairs of an expert" in text
        assert f"got {num_tokens} tokens and a limit of {limit}" in text


def replica_body(rank: int) -> str:
    """Ranks of one ep group that reach an expert on different ranks of it."""
    groups = make_groups(TWO)
    try:
        own = tuple(((1, 0) if source < 2 else (0, 1),) for source in range(4))
        placement = Placement(4, ((0,),), ((0, 2),), own)
        make_dispatcher(placement, groups)
    except ValueError as error:
        return str(error)
    finally:
        groups.close()
    return "no error"


@pytest.mark.dist
def test_two_levels_refuse_replicas_inside_a_group() -> None:
    for text in run_on_ranks(4, replica_body):
        assert "mesh.two_level" in text
        assert "replicas of an expert inside an ep group" in text


class _Group:
    """As much of a process group as planning needs where nothing really travels."""

    def size(self) -> int:
        return 4

    def rank(self) -> int:
        return 1


@pytest.mark.parametrize("kind", ["padded", "direct"])
def test_padded_planning_reads_nothing_from_the_device(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake tensors have no values: whatever asks for one raises. Direct dispatch must ask, which proves the check."""

    def moved(x_RD: Tensor, send: list[int], recv: list[int], *args: Any, **options: Any) -> Tensor:
        return x_RD.new_empty(sum(recv), *x_RD.shape[1:])

    monkeypatch.setattr(padded_module, "all_to_all_rows", moved)
    monkeypatch.setattr(plan_module, "exchange_counts", lambda counts, group: torch.empty_like(counts))
    groups = DispatchGroups(_Group(), None, _Group())  # type: ignore[arg-type]
    with FakeTensorMode():
        device = torch.device("cpu")
        to = Destinations.of([0, 0, 1, 2, 3, 3], [[0, 1], [2], [3], [4, 5]], 1, device)
        routing = Routing(
            token_N=torch.empty(20, dtype=torch.int32, device=device),
            weight_N=torch.empty(20, device=device),
            offset_E1=torch.empty(7, dtype=torch.int32, device=device),
            token_gid_T2=torch.empty(10, 2, dtype=torch.int64, device=device),
            num_tokens=10,
            limit=5,
        )
        if kind == "padded":
            (plan,) = padded_module.plan_padded([routing], to, groups, Padding(10, 5), None)
            assert plan.row_P.shape == (4 * 2 * 5,)
            assert plan.offset_e1.shape == (2,)
        else:
            with pytest.raises(Exception, match=r"data.dependent|_local_scalar_dense"):
                plan_module.plan_direct([routing], to, torch.zeros(1, device=device).int(), groups, None)


def overlap_body(rank: int) -> list[str]:
    """The order in which one layer with a shared expert starts, computes and waits; two pieces."""
    events: list[str] = []
    groups = make_groups(Mode())
    try:
        dispatcher = make_dispatcher(plan_static(groups.mesh, 4), groups, pieces=2)
        begin, works = collectives._begin_exchange, []

        def noted(*args: Any) -> tuple[Tensor, dist.Work | None]:
            rows_RD, work = begin(*args)
            if rows_RD.dim() == 2 and rows_RD.shape[1] == WIDTH:
                events.append("start")
                works.append(work)
                return rows_RD, _Noted(work, events)  # type: ignore[return-value]
            return rows_RD, work

        x_TD = torch.ones(4, WIDTH, requires_grad=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(collectives, "_begin_exchange", noted)
            sent = dispatcher.send(x_TD, integer_routing(4, 4, 2, 0), torch.zeros(1, dtype=torch.int32))
            shared_TD = _Marked.apply(x_TD, "shared", events)
            y_TD = sent.through(lambda rows: _Marked.apply(rows.x_RD, "experts", events))
            events.append("backward")
            (y_TD + shared_TD).sum().backward()
        return events
    finally:
        groups.close()


class _Noted:
    def __init__(self, work: dist.Work | None, events: list[str]) -> None:
        self._work, self._events = work, events

    def wait(self) -> None:
        self._events.append("wait")
        assert self._work is not None
        self._work.wait()


class _Marked(torch.autograd.Function):
    """Says when it runs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str, events: list[str]) -> Tensor:
        ctx.name, ctx.events = name, events
        events.append(name)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.events.append(ctx.name)
        return grad, None, None


@pytest.mark.dist
def test_rows_travel_while_the_shared_expert_and_other_pieces_compute_forward_and_backward() -> None:
    forward = ["start", "start", "shared"]
    forward += ["wait", "experts", "start"] * 2
    forward += ["wait", "wait"]
    backward = ["start", "start"]
    backward += ["wait", "experts", "start"] * 2
    backward += ["shared", "wait", "wait"]
    for events in run_on_ranks(2, overlap_body):
        assert events == [*forward, "backward", *backward]


def bad_body(rank: int) -> tuple[str, list[str]]:
    """What the layer says of bad logits on rank 1, and what the end of the step says, where nothing tells the host."""
    moe = make_moe(capacity_factor=1.0)
    groups = make_groups(Mode())
    said = "nothing"
    try:
        placement = plan_static(groups.mesh, 6)
        dispatcher = make_dispatcher(placement, groups, padding=Padding(4, rows_within_capacity(moe, 4)))
        held = placement.experts_of(rank)
        layer, _, balance = make_layer(moe, make_params(moe), dispatcher=dispatcher, experts=held)
        x_TD = tokens(4).detach()
        if rank == 1:
            x_TD[2, 0] = float("nan")
        layer(x_TD, context(4))
        said = "forward passed"
        balance.finish_step(lambda x: collectives.all_reduce_sum(x, groups.group("pool")))
    except FloatingPointError as error:
        return said, [str(error)]
    finally:
        groups.close()
    return said, []


@pytest.mark.dist
def test_padded_dispatch_leaves_bad_logits_to_the_end_of_the_step_on_every_rank() -> None:
    for said, errors in run_on_ranks(2, bad_body):
        assert said == "forward passed"
        assert len(errors) == 1
        assert "MoE layers [3]" in errors[0]
        assert "NaN or Inf" in errors[0]
