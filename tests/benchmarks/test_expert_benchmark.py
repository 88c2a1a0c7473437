"""What bench_experts.py is built of: shapes, the check before timing, memory, the report. No timing."""

import json
import sys
from functools import partial
from pathlib import Path

import bench_experts
import expert_case
import pytest
import torch
from ceilings import Ceilings, higher
from expert_case import PEERS, Setting, measure_case
from expert_layer import HOUSE_MARGIN, Competitor, check, definition, largest_errors, make_layer
from expert_peers import PIPELINES, ours, padded_bmm, sorted_loop, torch_pipeline, unfused
from peak_memory import peak_bytes, running_peak, saved_bytes
from shapes import Shape, choose_shapes, published_tflops

SMALL = Shape("small", T=48, D=64, F=32, E=5, K=2)
OWN_PEERS = ("recompute", "unfused", "loop", "bmm")


def test_a_shape_knows_its_work() -> None:
    (fine,) = choose_shapes(["cpu-fine"])
    assert fine == Shape("cpu-fine", T=4096, D=512, F=128, E=64, K=8)
    assert fine.num_pairs == 32768
    assert fine.forward_flop == 6 * 32768 * 128 * 512
    assert fine.forward_backward_flop == 18 * 32768 * 128 * 512


def test_shapes_are_chosen_by_name_once_each() -> None:
    assert len(choose_shapes(["all-gpu"])) == 12
    names = [shape.name for shape in choose_shapes(["7B-f256", "all-cpu", "cpu-mid"])]
    assert names == ["7B-f256", "cpu-fine", "cpu-mid", "cpu-quickstart"]
    with pytest.raises(
        ValueError, match=r"--shape must be all-cpu, all-gpu or one of .*, got 'cpu-fin'; did you mean cpu-fine\?"
    ):
        choose_shapes(["cpu-fin"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_competitor_gives_the_right_answer(dtype: torch.dtype) -> None:
    layer = make_layer(SMALL, dtype, "cpu")
    exact = definition(layer, torch.float64)
    plain = largest_errors(definition(layer, dtype), exact)
    assert exact["y"].abs().max() > 0.5  # nothing small enough to hide a wrong activation
    competitors = [torch_pipeline(layer, kind) for kind in PIPELINES]
    for one in [*competitors, unfused(layer), sorted_loop(layer), padded_bmm(layer)]:
        check(one, layer, exact, plain)
    check(ours(layer), layer, exact, plain, margin=HOUSE_MARGIN)
    check(ours(layer, recompute_h=True), layer, exact, plain, margin=HOUSE_MARGIN)


def test_a_wrong_answer_is_not_timed() -> None:
    layer = make_layer(SMALL, torch.float32, "cpu")
    exact = definition(layer, torch.float64)
    plain = largest_errors(definition(layer, torch.float32), exact)
    right = sorted_loop(layer)
    wrong = Competitor("wrong", lambda: right.run() * 1.001, right.leaves)
    with pytest.raises(
        ValueError, match=r"wrong on small .*: the largest error of y must be at most .*nothing was timed"
    ):
        check(wrong, layer, exact, plain)


def test_the_definition_is_what_autograd_says_of_a_dense_mixture() -> None:
    layer = make_layer(SMALL, torch.float64, "cpu")
    exact = definition(layer, torch.float64)
    gate_up_TE2F = torch.einsum("td,esfd->tesf", layer.x_TD, layer.w_in_E2FD)
    a_TEF = torch.nn.functional.silu(gate_up_TE2F[:, :, 0]) * gate_up_TE2F[:, :, 1]
    weight_TE = torch.zeros(SMALL.T, SMALL.E, dtype=torch.float64).scatter(1, layer.expert_id_TK, layer.weight_TK)
    y_TD = torch.einsum("te,tef,edf->td", weight_TE, a_TEF, layer.w_out_EDF)
    leaves = (layer.x_TD, layer.weight_TK, layer.w_in_E2FD, layer.w_out_EDF)
    dx_TD, dweight_TK, dw_in, dw_out = torch.autograd.grad(y_TD, leaves, layer.dy_TD)
    dweight_N = dweight_TK.flatten()[layer.pair_N.long()]
    for name, value in zip(exact, (y_TD, dx_TD, dweight_N, dw_in, dw_out), strict=True):
        torch.testing.assert_close(exact[name], value, msg=partial("{}: {}".format, name))


def test_a_running_peak_is_not_the_sum() -> None:
    assert running_peak([(1, 100), (4, 50), (2, -100), (3, 70)]) == 120
    assert running_peak([(1, -10)]) == 0


def test_the_peak_is_what_is_held_at_once() -> None:
    def call() -> torch.Tensor:
        first = torch.empty(1 << 20, dtype=torch.uint8)
        second = torch.empty(1 << 21, dtype=torch.uint8)
        del first
        third = torch.empty(1 << 19, dtype=torch.uint8)
        del second
        return third

    assert peak_bytes(call, "cpu") == (1 << 20) + (1 << 21)


def test_saved_bytes_count_each_memory_once_and_no_weight() -> None:
    x, w, row = torch.randn(8, 16, requires_grad=True), torch.randn(4, 16, requires_grad=True), torch.tensor([0, 3])

    def run() -> torch.Tensor:
        y = torch.nn.functional.linear(x, w)  # keeps x and w
        return (y * y).index_select(0, row)  # keeps y, twice, and row

    saved = saved_bytes(run, weights=(w,), metadata=())
    assert saved.activation_bytes == x.nbytes + 8 * 4 * 4
    assert saved.metadata_bytes == row.nbytes


def test_a_ceiling_is_the_best_that_was_seen() -> None:
    seen = higher(Ceilings(1.0, None, 20.0), Ceilings(0.5, 1.5, 30.0))
    assert seen == Ceilings(1.0, 1.5, 30.0)
    assert seen.tflops == 1.5
    assert Ceilings(1.0, None, 20.0).tflops == 1.0


def test_a_case_has_what_readers_look_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_case, "measure_ceilings", lambda dtype, device: Ceilings(1e3, None, 1.0))
    setting = Setting(torch.float32, "cpu", 1, OWN_PEERS, "default")
    report = json.loads(json.dumps(bench_experts.report_of({}, [measure_case(SMALL, setting)], {})))
    for name in bench_experts.HEADLINE:
        assert report[name] > 0, name
    (case,) = report["cases"]
    assert list(case["competitors"])[:2] == ["moetrain", "torch grouped_mm"]
    for name, one in case["competitors"].items():
        assert one["memory_ratio"] == pytest.approx(
            case["competitors"]["moetrain"]["peak_bytes"] / one["peak_bytes"]
        ), name
        assert one["saved_activation_bytes"] >= 4 * SMALL.T * SMALL.D, name
        assert set(one["errors"]) == {"y", "dx", "dweight", "dw_in", "dw_out"}, name
    kept = {name: one["saved_activation_bytes"] for name, one in case["competitors"].items()}
    assert kept["moetrain, h recomputed"] == 4 * SMALL.T * SMALL.D
    assert kept["moetrain"] == 4 * SMALL.T * SMALL.D + 4 * SMALL.num_pairs * 2 * SMALL.F
    assert case["memory_ratio_to_leanest_pipeline"] >= case["memory_ratio"]
    best = case["competitors"]["torch grouped_mm"]
    assert report["ratio_forward"] == best["ratio_forward"]
    assert "torch grouped_mm" in bench_experts.case_text(case)


def test_options_are_taken_out_with_their_values() -> None:
    given = ["--shape", "a", "--malloc", "both", "--json=x", "--save-as", "t", "--threads", "1"]
    assert bench_experts.without(given, "--malloc", "--json", "--save-as") == ["--shape", "a", "--threads", "1"]


def test_an_unknown_peer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench_experts.parse(["--peers", "loop,unfuse"])
    assert f"--peers must be some of {', '.join(PEERS)}, got 'unfuse'" in capsys.readouterr().err


def test_ours_is_held_against_published_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expert_case, "measure_ceilings", lambda dtype, device: Ceilings(1e3, None, 1.0))
    monkeypatch.setattr(expert_case, "published_tflops", lambda name: PUBLISHED if name == "small" else {})
    case = measure_case(SMALL, Setting(torch.float32, "cpu", 1, (), "default"))
    own = case["competitors"]["moetrain"]
    assert own["tflops_forward"] == pytest.approx(SMALL.forward_flop / own["forward_ms"] / 1e9)
    assert own["share_of_published"]["forward"] == pytest.approx(own["tflops_forward"] / 400)
    backward_ms = own["forward_backward_ms"] - own["forward_ms"]
    if backward_ms > 0:
        assert own["share_of_published"]["backward"] == pytest.approx(SMALL.backward_flop / backward_ms / 1e9 / 500)
    assert case["batched_bound"]["forward_backward_ms"] > case["batched_bound"]["forward_ms"] > 0
    text = bench_experts.case_text(case) + bench_experts.overview([case])
    assert "sonicmoe 400, momoe 200" in text
    assert "| small |" in text


PUBLISHED = {"forward": {"sonicmoe": 400, "momoe": 200}, "backward": {"sonicmoe": 500, "momoe": 250}}


def test_published_figures_are_those_of_the_shape() -> None:
    assert published_tflops("7B-f512")["forward"]["sonicmoe"] == 437
    assert published_tflops("7B-f512")["backward"]["deepgemm"] == 323
    assert published_tflops("cpu-fine") == {}
    assert all(published_tflops(shape.name) for shape in choose_shapes(["all-gpu"]))


def test_a_report_is_kept_after_each_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    seen = []

    def measured(shape: Shape, setting: Setting) -> dict[str, object]:
        seen.append(len(json.loads(path.read_text())["cases"]) if path.exists() else 0)
        return {**dict.fromkeys(bench_experts.HEADLINE, 1.0), "shape": {"name": shape.name}}

    monkeypatch.setattr(bench_experts, "measure_case", measured)
    monkeypatch.setattr(bench_experts, "case_text", lambda case: "")
    chosen = bench_experts.parse(["--shape", "all-cpu", "--json", str(path)])
    bench_experts.measure(chosen)
    assert seen == [0, 1, 2]
    assert len(json.loads(path.read_text())["cases"]) == 3
    monkeypatch.setattr(sys, "argv", ["bench", "--shape", "all-cpu", "--json", str(path), "--seconds", "0"])
    with pytest.raises(SystemExit, match=r"left out \(above\): cpu-mid, cpu-quickstart"):
        bench_experts.main()
    report = json.loads(path.read_text())
    assert len(report["cases"]) == 1, "the first shape is always measured"
    assert report["left_out"] == dict.fromkeys(("cpu-mid", "cpu-quickstart"), "0 seconds are over")


def test_a_shape_with_a_wrong_answer_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(shape: Shape, setting: Setting) -> dict[str, object]:
        if shape.name != "cpu-mid":
            raise ValueError(f"moetrain on {shape}: the largest error")
        return dict.fromkeys(bench_experts.HEADLINE, 1.0)

    monkeypatch.setattr(bench_experts, "measure_case", measured)
    monkeypatch.setattr(bench_experts, "case_text", lambda case: "")
    report = bench_experts.measure(bench_experts.parse(["--shape", "all-cpu"]))
    assert (len(report["cases"]), list(report["left_out"])) == (1, ["cpu-fine", "cpu-quickstart"])
    with pytest.raises(SystemExit, match="no shape could be measured"):
        bench_experts.measure(bench_experts.parse(["--shape", "cpu-fine"]))
