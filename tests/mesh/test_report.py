"""``moetrain mesh``: what it says of a folding, against places worked out by hand."""

import json
import sys
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore

from moetrain.cli.main import main
from moetrain.config.load import load_run
from moetrain.mesh import groups as mesh_groups
from moetrain.mesh.folded_mesh import NODE_SETS, FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.mesh.picture import figure_of, in_text
from moetrain.mesh.report import AxisReport, CommunicatorReport, axes_of, how_to_train, mesh_of
from moetrain.mesh.sharing import GROUP_NAMES


def test_the_command_says_who_stands_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "mesh.json"
    options = ["--mesh", "dp=2,cp=2,tp=2", "--experts", "ep=4,etp=2", "--ranks-per-node", "4"]
    assert main(["mesh", *options, "--json", str(path)]) == 0
    text = capsys.readouterr().out
    assert "8 ranks on 2 nodes of 4" in text
    assert "--mesh.cp 2 --mesh.tp 2 --mesh.ep 4 --mesh.etp 2 --sequence.planner context" in text
    written = json.loads(path.read_text())
    assert written["sizes"] == {
        "pp": 1, "dp_replicate": 1, "dp_shard": 2, "cp": 2, "tp": 2, "edp": 1, "ep": 4, "etp": 2,
    }  # fmt: skip
    assert written["axes"]["ep"] == {"size": 4, "groups": 2, "groups_across_nodes": 2}
    assert written["axes"]["tp"] == {"size": 2, "groups": 4, "groups_across_nodes": 0}
    fifth = written["ranks"][5]
    assert {name: fifth[name] for name in ("node", "dp_shard", "cp", "tp", "ep", "etp")} == {
        "node": 1, "dp_shard": 1, "cp": 0, "tp": 1, "ep": 2, "etp": 1,
    }  # fmt: skip


def test_named_groups_are_shown_with_what_they_cross_and_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two nodes of four ranks: tp is inside a node, and dispatch, over all eight ranks, takes them in two steps."""
    path = tmp_path / "mesh.json"
    options = ["--mesh", "dp=4,tp=2", "--experts", "ep=8", "--ranks-per-node", "4", "--two-level", "--json", str(path)]
    assert main(["mesh", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("│")[1].strip(): line for line in lines if line.startswith("│")}
    assert "8 │      1 │ 0, 1, 2, ... 7" in rows["world, pool"]
    assert "4 │      2 │ 0, 2, 4, 6" in rows["data, shard, dp_shard"]
    assert "8 │      1 │ 0, 1, 2, ... 7" in rows["dispatch, ep"]
    assert "4 │      2 │ 0, 1, 2, 3" in rows["ep_inside"]
    assert "2 │      4 │ 0, 4" in rows["ep_between"]
    assert "inside a node" in rows["ep_inside"]
    assert all("crosses nodes" in rows[name] for name in ("world, pool", "dispatch, ep", "ep_between", "sparse"))
    assert not any(line.startswith("│ tp ") for line in lines[lines.index(rows["world, pool"]) :]), "told as an axis"
    written = json.loads(path.read_text())
    assert written["two_level"] is True
    groups = written["groups"]
    assert set(groups) == {*GROUP_NAMES, *NODE_SETS, "sparse"}
    assert groups["data"] == {"size": 4, "groups": 2, "groups_across_nodes": 2, "communicator": "data"}
    assert groups["shard"]["communicator"] == "data"
    assert groups["pool"] == {"size": 8, "groups": 1, "groups_across_nodes": 1, "communicator": "world"}
    assert groups["ep_inside"] == {"size": 4, "groups": 2, "groups_across_nodes": 0, "communicator": "ep_inside"}
    assert groups["ep_between"] == {"size": 2, "groups": 4, "groups_across_nodes": 4, "communicator": "ep_between"}
    assert groups["sparse"] == {**groups["pool"], "communicator": "sparse"}
    assert main(["mesh", *options[:-3], "--json", str(path)]) == 0
    assert not set(NODE_SETS) & set(json.loads(path.read_text())["groups"])
    assert "ep_inside" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "mesh",
    [
        FoldedMesh(),
        FoldedMesh(dp_replicate=2, dp_shard=2, tp=2, ep=4, etp=2),
        FoldedMesh(pp=2, dp_shard=4, cp=2, tp=2, edp=2, ep=4, etp=2, ranks_per_node=4, two_level=True),
        FoldedMesh(dp_shard=8, tp=2, ep=16, ranks_per_node=4, two_level=True),
    ],
)
def test_names_share_a_communicator_where_their_process_groups_are_one(
    mesh: FoldedMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mesh_groups, "_connect", lambda groups, device_type: None)  # it would use GPUs
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=mesh.world_size)
    try:
        made = MeshGroups.create(mesh, device_type="cuda")
        told = {name: shared for shared in CommunicatorReport.all_of(mesh) for name in shared.names}
        for name, shared in told.items():
            assert shared.groups.first_group == made.ranks(name)
            assert set(shared.names) == {other for other in told if made.group(other) is made.group(name)}
        assert set(told) == {*GROUP_NAMES, "sparse", *(NODE_SETS if mesh.two_level else ())}
    finally:
        dist.destroy_process_group()


def test_what_is_left_out_is_what_remains() -> None:
    assert mesh_of("tp=2", "ep=4", 16, 8) == FoldedMesh(dp_shard=8, tp=2, edp=4, ep=4)
    assert mesh_of("", "ep=4", None, 8) == FoldedMesh(dp_shard=4, ep=4)
    assert mesh_of("pp=2,dp=4", "etp=2", None, 8) == FoldedMesh(pp=2, dp_shard=4, edp=2, etp=2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["--mesh", "dp=2,tp=2", "--experts", "edp=1,ep=3"],
            "not to 4 ranks; nearest legal: edp=1 ep=4, or edp=2 ep=2",
        ),
        (["--mesh", "dp=2,tp=2", "--experts", "ep=8"], "--mesh: its axes multiply to 4, not to 8 ranks"),
        (
            ["--mesh", "tp=3", "--ranks", "8"],
            "multiply to 3, which must divide 8 ranks; nearest legal: dp_shard=2 tp=4",
        ),
        (["--mesh", "dp=2", "--ranks", "8"], "its axes multiply to 2, not to 8 ranks; nearest legal: dp_shard=8"),
        (
            ["--mesh", "pp=3", "--ranks", "8"],
            "--mesh: its axes multiply to 3, which must divide 8 ranks; nearest legal:",
        ),
        (["--experts", "ep=3", "--ranks", "4096"], "must divide 4096 ranks; nearest legal: edp=1024 ep=4, or"),
        (["--experts", "etp=3,edp=2", "--ranks", "8"], "not to 8 ranks; nearest legal: edp=2 etp=4, or edp=4 etp=2"),
        (["--ranks", "eight"], "moetrain mesh: argument --ranks: invalid int value: 'eight'; see moetrain mesh --help"),
        (["--nodes", "2"], "moetrain mesh: unrecognized arguments: --nodes 2; see moetrain mesh --help"),
        (["--ranks", "0"], "--ranks must be at least 1, got 0"),
        (["--mesh", "dp=99999999999"], "at most 65536 ranks can be shown, got 99999999999"),
        (["--mesh", "up=2"], "unknown axis 'up'"),
        (
            ["--experts", "ep=6", "--ranks-per-node", "4", "--two-level"],
            "as many ranks on each of their nodes, but ep=6 * etp=1 = 6 does not fit nodes of 4 ranks; nearest legal "
            "axes: edp=3 ep=2 etp=1, or",
        ),
        (["--ranks-per-node", "0"], "mesh.ranks_per_node must be at least 1, got 0"),
    ],
)
def test_impossible_foldings_are_refused(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mesh", *options]) == 2
    complaint = capsys.readouterr().err
    assert said in complaint
    assert complaint.count("\n") == 1


class TpOutermost(FoldedMesh):
    """Mutation: tp and dp_shard, etp and edp, change places in the order of ranks."""

    def _stride(self, axis: str) -> int:
        order = {"tp": ("dp_shard", "cp"), "dp_shard": (), "cp": ("dp_shard",), "etp": ("edp", "ep"), "edp": ()}
        return prod(getattr(self, inner) for inner in order.get(axis, ("edp",)))


def crossing(mesh: FoldedMesh) -> dict[str, int]:
    return {axis: AxisReport.of(mesh, axis).num_crossing for axis in ("tp", "ep", "etp", "dispatch")}


@st.composite
def meshes_of_nodes(draw: st.DrawFn) -> dict[str, int]:
    """Sizes of a mesh of up to 4,096 ranks whose tp and ep * etp divide a node's 8, whatever the other axes are."""
    tp = draw(st.sampled_from([1, 2, 4, 8]))
    etp = draw(st.sampled_from([1, 2, 4, 8]))
    ep = draw(st.sampled_from([size for size in (1, 2, 4, 8) if size * etp <= 8]))
    pp = draw(st.integers(1, 4))
    outer = [draw(st.integers(1, most)) for most in (4, 4, 8)]  # of what is not tp: any numbers, odd ones too
    unit = max(tp, ep * etp)
    while pp * prod(outer) * unit > 4096:
        outer[outer.index(max(outer))] -= 1
    pool = prod(outer) * unit
    replicate, cp, _ = outer
    shard = pool // (replicate * cp * tp)
    return {
        "pp": pp, "dp_replicate": replicate, "dp_shard": shard, "cp": cp, "tp": tp,
        "edp": pool // (ep * etp), "ep": ep, "etp": etp,
    }  # fmt: skip


@given(meshes_of_nodes())
@settings(max_examples=300, deadline=None)
def test_axes_that_divide_a_node_stay_inside_it(sizes: dict[str, Any]) -> None:
    """Up to 4,096 ranks, eight to a node, in the default order."""
    assert set(crossing(FoldedMesh(**sizes)).values()) == {0}


@pytest.mark.parametrize("world", [16, 64, 512, 4096])
def test_another_order_would_cross_nodes(world: int) -> None:
    for tp, ep, etp in ((2, 4, 2), (8, 8, 1), (4, 1, 8)):
        sizes: dict[str, Any] = {"dp_shard": world // tp, "tp": tp, "edp": world // (ep * etp), "ep": ep, "etp": etp}
        assert sum(crossing(FoldedMesh(**sizes)).values()) == 0
        wrong = crossing(TpOutermost(**sizes))
        assert wrong["tp"] == world // tp
        assert wrong["dispatch"] == world // (ep * etp)
        assert AxisReport.of(FoldedMesh(**sizes), "dp_shard").num_crossing == tp, "the outermost axis must cross"


def test_crossing_is_counted_group_by_group() -> None:
    odd = FoldedMesh(dp_shard=4, tp=3, edp=12, ranks_per_node=8)
    report = AxisReport.of(odd, "tp")
    assert (report.num_groups, report.num_crossing, report.verdict) == (4, 1, "1 of 4 groups cross nodes")
    assert AxisReport.of(odd, "dp_shard").verdict == "crosses nodes"
    assert AxisReport.of(odd, "dp_shard").travels == "dense weights and gradients"
    assert (AxisReport.of(odd, "cp").verdict, AxisReport.of(odd, "cp").travels) == ("one rank", "nothing")


def test_it_says_how_to_train_with_a_folding(capsys: pytest.CaptureFixture[str]) -> None:
    """And those options give the same folding."""
    mesh = FoldedMesh(dp_replicate=2, dp_shard=4, tp=2, edp=1, ep=8, etp=2)
    said = how_to_train(mesh)
    assert said == (
        "train with it on 16 ranks: moetrain train --mesh.dp_replicate 2 --mesh.tp 2 --mesh.ep 8 --mesh.etp 2"
    )
    for shown in (mesh, replace(mesh, ranks_per_node=4), replace(mesh, ranks_per_node=4, two_level=True)):
        _, _, options = how_to_train(shown).partition("moetrain train ")
        assert FoldedMesh.from_config(load_run(options.split()).mesh, 16) == shown
    assert main(["mesh", "--ranks", "1"]) == 0
    assert "1 rank on 1 node of 8" in capsys.readouterr().out


def test_a_picture_needs_matplotlib_and_a_known_ending(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new folder" / "mesh.png"
    assert main(["mesh", "--mesh", "dp=2", "--draw", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert main(["mesh", "--mesh", "dp=2", "--draw", str(tmp_path / "mesh.doc")]) == 2
    assert "mesh.doc must end in .png, .svg or .pdf, got '.doc'" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["mesh", "--mesh", "dp=2", "--draw", str(path)]) == 2
    assert "--draw needs matplotlib; pip install 'moetrain[figures]'" in capsys.readouterr().err


@dataclass(frozen=True)
class Cell:
    """What a picture shows of one rank."""

    node: str
    colour: tuple[float, ...]
    coordinates: dict[str, int]


def cells_of(panel: Any) -> dict[int, Cell]:
    """By rank, read from where things stand in one of the two parts of a picture."""
    texts = [(*text.get_position(), text.get_text()) for text in panel.texts]
    found = {}
    for patch in panel.patches:
        left, low, right, high = patch.get_x(), patch.get_y(), patch.get_x() + patch.get_width(), patch.get_y() + 1.0
        inside = [text for x, y, text in texts if left <= x <= right and low <= y <= high]
        beside = [text for x, y, text in texts if x < 0 and low <= y <= high]
        rank = int(next(text for text in inside if text.isdigit()))
        lines = next(text for text in inside if not text.isdigit()).splitlines()
        coordinates = {axis: int(value) for axis, value in (line.split() for line in lines)}
        found[rank] = Cell(beside[0], patch.get_facecolor(), coordinates)
    return found


def test_the_command_draws_in_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Without colours, as in a file: letters say who belongs together."""
    assert main(["mesh", "--mesh", "dp=4,tp=3", "--experts", "edp=2,ep=3,etp=2", "--ranks-per-node", "8"]) == 0
    text = capsys.readouterr().out
    drawn = text[text.index("attention: one") : text.index("\n", text.index("  node 1", text.index("experts: one")))]
    assert drawn.splitlines() == [
        "attention: one letter, a group along tp",
        "  node 0    0 a    1 a    2 a    3 b    4 b    5 b    6 c    7 c ",
        "  node 1    8 c    9 d   10 d   11 d ",
        "experts: one letter, a group along ep and etp",
        "  node 0    0 a    1 a    2 a    3 a    4 a    5 a    6 b    7 b ",
        "  node 1    8 b    9 b   10 b   11 b ",
    ]
    last = [line.plain for line in in_text(FoldedMesh(dp_shard=1024, edp=1024))][-2:]
    assert last[0].endswith(" 127 dx ")
    assert last[1] == "  ... and 112 more nodes"
    assert in_text(FoldedMesh())[0].plain == "attention: one letter, every rank alone"
    one_of_702 = in_text(FoldedMesh(dp_shard=703, edp=703, ranks_per_node=703))[1].plain
    assert one_of_702.endswith(" 701 zz   702 aaa ")


@pytest.mark.parametrize("per_node", [8, 4, 3])
def test_the_picture_shows_every_rank_where_it_stands(per_node: int) -> None:
    mesh = mesh_of("dp=2,cp=2,tp=2", "ep=4,etp=2", None, per_node)
    figure = figure_of(mesh, [AxisReport.of(mesh, axis) for axis in axes_of(mesh)])
    for panel, axes, inner in zip(
        figure.axes, (("dp_shard", "cp", "tp"), ("ep", "etp")), (("cp", "tp"), ("ep", "etp")), strict=True
    ):
        cells = cells_of(panel)
        assert sorted(cells) == list(range(8))
        for rank, cell in cells.items():
            assert cell.node == f"node {rank // per_node}"
            assert cell.coordinates == {axis: mesh.coordinate(rank, axis) for axis in axes}
            alike = tuple(sorted(other for other, one in cells.items() if one.colour == cell.colour))
            assert alike == mesh.group_of(rank, inner)
        assert " and ".join(inner) in panel.get_title(loc="left")
    assert [text.get_text() for text in figure.texts if "dp_shard = 2" in text.get_text()]
