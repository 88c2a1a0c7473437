"""Does token rounding cost quality? Small trainings with each rule and the exact top-k, on the same seeds.

Run: python benchmarks/rounding_quality.py --corpus corpora/quickstart --save-as epyc

The preset ``tiny`` with 512 tokens a micro-batch, 128 rows an expert on average, in tiles of 64: two tiles an expert is
where the method's authors still find it robust (arXiv 2512.14080). A seed sets initial values and the order of the
data; runs of one seed differ in rounding alone. Evaluation routes by the exact top-k.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import torch
from timing import RESULTS, machine

from moetrain.config import RunConfig
from moetrain.config.moe import RoundingRule
from moetrain.config.presets import preset
from moetrain.train.loop import train


def run_of(arguments: argparse.Namespace, rule: RoundingRule, seed: int, folder: Path) -> RunConfig:
    base = preset("tiny")
    return replace(
        base,
        seed=seed,
        run_dir=folder,
        dispatch=replace(base.dispatch, rounding=rule, tile=arguments.tile),
        data=replace(base.data, path=arguments.corpus, global_batch=8, micro_batch=8),
        optim=replace(base.optim, warmup_steps=20),
        train=replace(
            base.train,
            steps=arguments.steps,
            eval_every=0,
            final_eval_rows=arguments.eval_rows,
            device="cpu",
            threads=1,
        ),
        checkpoint=replace(base.checkpoint, every=0, keep=1),
    )


def losses(arguments: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Of each rule, what every seed came to."""
    found: dict[str, list[dict[str, float]]] = {rule: [] for rule in arguments.rules}
    for seed in arguments.seeds:
        for rule in arguments.rules:
            with tempfile.TemporaryDirectory() as folder:
                summary = train(run_of(arguments, rule, seed, Path(folder) / "run"))
            kept = ("validation_loss", "train_loss", "rows_added", "rows_dropped", "train_seconds")
            found[rule].append({"seed": seed, **{name: summary[name] for name in kept}})
    return found


def table(found: dict[str, list[dict[str, float]]], num_pairs: int) -> str:
    exact = [run["validation_loss"] for run in found["none"]]
    seeds = [f"seed {run['seed']}" for run in found["none"]]
    head = ["rule", *seeds, "mean", "to top-k, by seed", "rows added", "rows dropped"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for rule, runs in found.items():
        loss = [run["validation_loss"] for run in runs]
        change = [a - b for a, b in zip(loss, exact, strict=True)]
        spread = f" ± {stdev(change):.4f}" if len(change) > 1 else ""
        rows = [f"{mean(run[name] for run in runs) / num_pairs:.2%}" for name in ("rows_added", "rows_dropped")]
        lines.append([rule, *(f"{x:.4f}" for x in loss), f"{mean(loss):.4f}", f"{mean(change):+.4f}{spread}", *rows])
    spread = f"Spread of top-k over seeds: {stdev(exact):.4f} nats." if len(exact) > 1 else ""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + f"\n\n{spread}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, default=Path("corpora/quickstart"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--tile", type=int, default=64)
    parser.add_argument("--eval-rows", type=int, default=1024, help="validation rows at the end")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rules", nargs="+", default=["none", "nearest", "balance", "down"], help="none first")
    parser.add_argument("--save-as", help="hardware tag; writes results/rounding_quality_<tag>_<YYYYMM>.{md,json}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = losses(arguments)
    run = run_of(arguments, "none", 0, Path("unused"))
    tokens = run.data.global_batch * run.data.seq_len * arguments.steps
    num_pairs = tokens * run.moe.top_k * len(run.model.moe_layers)
    where = machine()
    options = f"{arguments.steps} steps of {tokens // arguments.steps} tokens, tile {arguments.tile}"
    head = ["# rounding quality", "", *(f"- {key}: {value}" for key, value in where.items()), f"- runs: {options}", ""]
    text = "\n".join([*head, "Validation loss in nats per byte.", "", table(found, num_pairs)])
    sys.stdout.write(text)
    if arguments.save_as is not None:
        stem = RESULTS / f"rounding_quality_{arguments.save_as}_{time.strftime('%Y%m')}"
        stem.with_suffix(".md").write_text(text)
        stem.with_suffix(".json").write_text(json.dumps({"machine": where, "runs": found}, indent=1))


if __name__ == "__main__":
    main()
