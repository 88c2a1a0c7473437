"""Planners of placements: how level loads are, how many rows travel, how long planning takes, what a step would gain.

    python benchmarks/bench_placement.py --quick --json out.json
    python benchmarks/bench_placement.py --trace loads.npz --groups-per-node 8 --slots 2

The corpus: 32 ranks on 4 nodes, 64 experts, top-8, Zipf 0.8 with a random walk of 0.1 a step, 2 slots, ten seeds. Loads
are the highest over the least possible one (linear relaxation, by HiGHS where scipy is there, else the mean). Rows are
counted token by token and compared with static expert parallelism on the same choices. Speedups are modelled, not
measured (placement_model.py). hecate's t is beyond all experts here: none of its slots is left empty.

With --trace, ``count`` [step, layer, source, expert] is planned for instead: loads alone, for tokens are not recorded.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from placement_bytes import bytes_figures
from placement_corpus import Corpus, Ints, by_node, read_trace
from placement_model import Modelled, Scene, break_even, losing_map, scenes, speedups
from placement_outcome import Outcome, SeatPlan, by_pair, by_token, least_load
from placement_peers import PEERS
from placement_peers.eplb import plan_layers as eplb_layers
from placement_planners import plan_ours, planner_ms, skewed_layers, split_anew
from placement_training import training_figures
from timing import machine

from moetrain.placement.planner.predict import PREDICTORS, make_predictor

CORPUS = Corpus()
SHAPES = {  # groups, experts, layers
    "64x64x32": (64, 64, 32),
    "1024x256x64": (1024, 256, 64),
}
Figures = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer seeds and rounds for what is modelled and timed")
    parser.add_argument(
        "--part", choices=PARTS, action="append", help="only that, as often as wanted; without: all but train"
    )
    parser.add_argument("--json", type=Path, default=None, help="where to write all figures")
    parser.add_argument(
        "--trace",
        type=Path,
        default=None,
        help="recorded loads: an .npz file with count, a folder of such pieces, or a run",
    )
    parser.add_argument("--groups-per-node", type=int, default=8, help="of the trace")
    parser.add_argument("--slots", type=int, default=2, help="for the trace")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    figures: Figures = {"machine": machine()}
    if chosen.trace is not None:
        figures |= of_trace(read_trace(chosen.trace), chosen.groups_per_node, chosen.slots)
    else:
        for part in chosen.part or [name for name in PARTS if name != "train"]:
            figures |= PARTS[part](chosen.quick)
    text = json.dumps(figures, indent=1)
    print(text)
    if chosen.json is not None:
        chosen.json.write_text(text + "\n")


def part_loads(quick: bool) -> Figures:
    """Loads and rows of our planners and of the peers, on given loads and on the step after the predicted one."""
    met = scenes(CORPUS, range(10))
    bounds = [bound(scene.count_SE) for scene in met]
    owners = SeatPlan.even([[int(owner)] for owner in CORPUS.owners()], CORPUS.num_groups)
    static = [by_token(CORPUS, scene.choice_STK, owners) for scene in met]
    table = {"static EP": row_of(static, bounds, static)}
    for name, plan in planners(known=True).items():
        table[name] = row_of([by_token(CORPUS, scene.choice_STK, plan(scene)) for scene in met], bounds, static)
    following: dict[str, dict[str, float]] = {}
    for name, plan in planners(known=False).items():
        later = [by_token(CORPUS, scene.choice_STK, plan(scene)) for scene in met]
        following[name] = row_of(later, bounds, static)
        table[name]["load_next"] = mean(one.gap for one in later)
    ours = table["moetrain"]
    ratios = ("rows_ratio", "node_rows_ratio", "hottest_receiver_ratio")
    return {
        "gap_mean": ours["gap_mean"],
        "gap_max": ours["gap_max"],
        "load_next_mean": ours["load_next"],
        "load_next_hecate_even": table["hecate, even split"]["load_next"],
        **{key: ours[key] for key in ratios},
        "next_step": {key: following["moetrain"][key] for key in ratios},
        "load_next_split_anew": mean(
            highest(
                split_anew(CORPUS, scene.predicted_NE, by_node(scene.count_SE, CORPUS.groups_per_node)), scene.count_SE
            )
            for scene in met
        ),
        "per_token_over_per_pair_rows": token_over_pair(met),
        "planners": table,
    }


Maker = Callable[[Scene], SeatPlan]


def planners(*, known: bool) -> dict[str, Maker]:
    """By name. ``known``: for the very loads that come; else for what is predicted, peers for the step before."""

    def ours(planner: str) -> Maker:
        def plan(scene: Scene) -> SeatPlan:
            count_NE = by_node(scene.count_SE, CORPUS.groups_per_node) if known else scene.predicted_NE
            return plan_ours(planner, CORPUS, count_NE)

        return plan

    def peer(name: str) -> Maker:
        return lambda scene: PEERS[name](CORPUS, scene.count_SE if known else scene.seen_SE)

    return {
        "moetrain": ours("moetrain"),
        "hecate, even split": ours("hecate"),
        **{name: peer(name) for name in PEERS},
    }


def token_over_pair(met: list[Scene]) -> float:
    """Rows where tokens are assigned whole, over rows where each pair goes for itself, at the same quotas."""
    plan = planners(known=True)["moetrain"]
    ratios = []
    for scene in met:
        seats = plan(scene)
        ratios.append(by_token(CORPUS, scene.choice_STK, seats).rows / by_pair(CORPUS, scene.choice_STK, seats).rows)
    return mean(ratios)


def bound(count_SE: Ints) -> float:
    """The least highest load, over the mean."""
    count_E = count_SE.sum(0).astype(float)
    return least_load(count_E, CORPUS.owners(), CORPUS.num_groups, CORPUS.slots) * CORPUS.num_groups / count_E.sum()


def row_of(found: list[Outcome], bounds: list[float], static: list[Outcome]) -> dict[str, float]:
    """A planner's line: the gap to the bound, rows as they are and against static expert parallelism."""
    gaps = [one.gap / least for one, least in zip(found, bounds, strict=True)]
    rows = {"rows": "rows", "node_rows": "node_rows", "hottest_receiver": "hottest"}
    values = {name: [float(getattr(one, field)) for one in found] for name, field in rows.items()}
    others = {name: [float(getattr(one, field)) for one in static] for name, field in rows.items()}
    return {
        "gap_mean": mean(gaps),
        "gap_max": max(gaps),
        **{name: mean(values[name]) for name in rows},
        **{f"{name}_ratio": mean(values[name]) / mean(others[name]) for name in rows},
    }


def part_shift(quick: bool) -> Figures:
    """All popularities change their experts: a plan of the loads before, and one of the true ones (calibration)."""
    stale, calibrated = [], []
    for seed in range(10):
        steps = CORPUS.steps(seed, shift_at=5)
        before, after = [next(steps) for _ in range(6)][-2:]
        count_SE = CORPUS.count(after)
        old, new = (
            plan_ours("moetrain", CORPUS, by_node(each_SE, CORPUS.groups_per_node))
            for each_SE in (CORPUS.count(before), count_SE)
        )
        stale.append(by_token(CORPUS, after, old).gap)
        calibrated.append(by_token(CORPUS, after, new).gap)
    return {"shift_load_predicted": mean(stale), "shift_load_calibrated": mean(calibrated)}


def part_prediction(quick: bool) -> Figures:
    """Relative errors of the predictors, and the load of plans made by them."""
    errors: dict[str, float] = {}
    loads: dict[str, float] = {}
    for rule in PREDICTORS:
        seen_errors, met_loads = [], []
        for seed in range(10):
            predictor = make_predictor(rule, 1, CORPUS.num_nodes, CORPUS.num_experts)
            steps = CORPUS.steps(seed)
            for _ in range(6):
                observe(predictor.observe, CORPUS.count(next(steps)))
            predicted_LNE = predictor.predict()
            assert predicted_LNE is not None
            plan = plan_ours("moetrain", CORPUS, predicted_LNE[0].numpy())
            count_SE = CORPUS.count(next(steps))
            met_loads.append(highest(plan, count_SE))
            observe(predictor.observe, count_SE)
            assert predictor.error is not None
            seen_errors.append(predictor.error)
        errors[rule], loads[rule] = mean(seen_errors), mean(met_loads)
    return {"prediction_error": errors, "load_next_by_predictor": loads}


def observe(take: Callable[[torch.Tensor], None], count_SE: Ints) -> None:
    take(torch.from_numpy(by_node(count_SE, CORPUS.groups_per_node)).unsqueeze(0))


def highest(plan: SeatPlan, count_SE: Ints) -> float:
    """Load over the mean, shares not rounded."""
    load_G = plan.loads(count_SE)
    return float(load_G.max() / load_G.mean())


def part_times(quick: bool) -> Figures:
    """CPU milliseconds of one call for all layers, the best of several; EPLB in numpy takes turns with ours."""
    times: dict[str, dict[str, float]] = {}
    for name, (num_groups, num_experts, num_layers) in SHAPES.items():
        corpus = replace(CORPUS, num_groups=num_groups, num_experts=num_experts)
        count_LNE = skewed_layers(corpus, num_layers)
        load_LE = count_LNE.sum(1).double().numpy()
        replicas = num_experts + num_groups * corpus.slots
        taken: dict[str, list[float]] = {"hecate": [], "moetrain": [], "EPLB": []}
        for _ in range(3 if quick else 9):
            for planner in ("hecate", "moetrain"):
                rounds = 20 if num_groups < 100 else 3
                taken[planner].append(planner_ms(planner, corpus, count_LNE, rounds=rounds))
            start = time.thread_time()
            eplb_layers(load_LE, replicas, num_groups)
            taken["EPLB"].append((time.thread_time() - start) * 1e3)
        times[name] = {planner: min(each) for planner, each in taken.items()}
    return {
        "planner_ms": times,
        "eplb_time_ratio": {name: each["EPLB"] / each["moetrain"] for name, each in times.items()},
    }


def part_model(quick: bool) -> Figures:
    """Modelled speedups, and where there is none."""
    modelled = Modelled(range(3 if quick else 10))
    overlaps = (0.0, 0.5, 1.0)
    rows = losing_map(modelled, (256, 1024, 4096, 16384, 65536), overlaps)
    return {
        "speedup_over_ep": speedups(modelled),
        "losing_map_gpt_s_a": rows,
        "break_even_tokens": {
            planner: {str(overlap): break_even(rows, planner, overlap) for overlap in overlaps}
            for planner in ("hecate", "moetrain")
        },
    }


PARTS: Mapping[str, Callable[[bool], Figures]] = {
    "loads": part_loads,
    "shift": part_shift,
    "prediction": part_prediction,
    "times": part_times,
    "model": part_model,
    "bytes": bytes_figures,
    "train": training_figures,
}


def of_trace(count_TLSE: Ints, groups_per_node: int, slots: int) -> Figures:
    """Every layer and step of a recorded run but the first few: planned on itself, and on what was predicted for it."""
    num_steps, num_layers, num_groups, num_experts = count_TLSE.shape
    if num_groups % groups_per_node:
        raise ValueError(f"--groups-per-node must divide the {num_groups} sources of the trace, got {groups_per_node}")
    corpus = replace(
        CORPUS, num_groups=num_groups, groups_per_node=groups_per_node, num_experts=num_experts, slots=slots
    )
    planners = ("static", "hecate", "moetrain")
    given: dict[str, list[float]] = {planner: [] for planner in planners}
    later: dict[str, list[float]] = {planner: [] for planner in planners}
    errors = []
    predictor = make_predictor("ema", num_layers, corpus.num_nodes, num_experts)
    for count_LSE in count_TLSE:
        predicted_LNE = predictor.predict()
        for layer, count_SE in enumerate(count_LSE if count_LSE.any() else ()):
            for planner in planners:
                plan = plan_ours(planner, corpus, by_node(count_SE, groups_per_node))
                given[planner].append(highest(plan, count_SE))
                if predicted_LNE is not None:
                    plan = plan_ours(planner, corpus, predicted_LNE[layer].numpy())
                    later[planner].append(highest(plan, count_SE))
        predictor.observe(torch.from_numpy(np.stack([by_node(one, groups_per_node) for one in count_LSE])))
        errors += [] if predictor.error is None else [predictor.error]
    return {
        "trace": {"steps": num_steps, "layers": num_layers, "sources": num_groups, "experts": num_experts},
        "load_given": {planner: mean(values) for planner, values in given.items()},
        "load_given_max": {planner: max(values) for planner, values in given.items()},
        "load_next": {planner: mean(values) for planner, values in later.items()},
        "prediction_error": mean(errors),
    }


if __name__ == "__main__":
    main()
