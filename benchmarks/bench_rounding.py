"""round_pairs (with offer_pairs) against plain torch, and the padding that rounding avoids against the formula.

Run: python benchmarks/bench_rounding.py

Random routers over 16,384 tokens, top-4, and the quick start's shape. Kept pairs are compared before anything is
timed. Padding is what a grouped product in tiles of 128 rows computes beyond the rows it is given.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass

import torch
from timing import RESULTS, Row, arguments, compare, machine, report
from torch import Tensor

from moetrain.ops import RoundedPairs, group_pairs, offer_pairs, round_pairs, select_experts

TILE = 128
SHAPES = {  # tokens, experts, top-k
    "quick start": (2048, 16, 4),
    "32 experts": (16384, 32, 4),
    "64 experts": (16384, 64, 4),
    "64 experts, top-8": (16384, 64, 8),
    "128 experts": (16384, 128, 4),
    "256 experts": (16384, 256, 4),
}


@dataclass(frozen=True, slots=True)
class Padding:
    """Padded rows as a share of all pairs."""

    case: str
    formula: float  # E * M / (2 * T * K)
    before: float
    after: float
    rows_changed: float  # pairs added and dropped, as a share of all


@dataclass(frozen=True, slots=True)
class Routed:
    """One router's choice."""

    score_TE: Tensor
    chosen_TE: Tensor
    token_N: Tensor
    offset_E1: Tensor
    gid_T2: Tensor

    @staticmethod
    def random(num_tokens: int, num_experts: int, top_k: int) -> "Routed":
        random = torch.Generator().manual_seed(0)
        logits_TE = torch.randn(num_tokens, num_experts, generator=random)
        expert_id_TK = select_experts(logits_TE, top_k).expert_id_TK
        pair_N, offset_E1 = group_pairs(expert_id_TK.reshape(-1), num_experts)
        token_T = torch.arange(num_tokens)
        return Routed(
            logits_TE.softmax(-1),
            torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, expert_id_TK.long(), True),
            (pair_N // top_k).int(),
            offset_E1,
            torch.stack((token_T // 512, token_T % 512), 1),
        )


def ours(routed: Routed, rule: str = "nearest") -> RoundedPairs:
    offers = offer_pairs(routed.score_TE, routed.token_N, routed.offset_E1, routed.gid_T2, TILE)
    return round_pairs(routed.score_TE, routed.token_N, routed.offset_E1, offers, TILE, rule)  # type: ignore[arg-type]


def by_sorting(routed: Routed) -> tuple[Tensor, Tensor]:
    """The nearest rule as torch code would have it: one sort per column, then the first rows of each. (token, end)."""
    key_TE = torch.where(routed.chosen_TE, routed.score_TE + 2.0, routed.score_TE)  # leaves 22 bits to the score
    order_TE = key_TE.sort(dim=0, descending=True, stable=True).indices
    count_E = routed.offset_E1.diff().long()
    down_E = count_E - count_E % TILE
    rows_E = torch.where(down_E + TILE - count_E < count_E - down_E, down_E + TILE, down_E)
    kept_ET = torch.zeros_like(routed.chosen_TE.T)
    rank_T1 = torch.arange(len(key_TE))[:, None]
    kept_ET.scatter_(1, order_TE.T, (rank_T1 < rows_E).T)
    return kept_ET.nonzero()[:, 1], rows_E.cumsum(0)


def bench(name: str, rounds: int) -> Row:
    routed = Routed.random(*SHAPES[name])
    mine, (token_N, end_E) = ours(routed), by_sorting(routed)
    assert torch.equal(mine.offset_E1[1:].long(), end_E)
    same = (mine.token_P[: len(token_N)].long() == token_N).double().mean()
    assert same > 0.999, "but for ties that adding 2 makes"
    competitors = {"moetrain": lambda: ours(routed), "torch sort": lambda: by_sorting(routed)}
    return compare(f"{name}: {SHAPES[name]}", competitors, rounds=rounds)


def padding(name: str) -> Padding:
    num_tokens, num_experts, top_k = SHAPES[name]
    routed = Routed.random(num_tokens, num_experts, top_k)
    rounded = ours(routed)
    pairs = num_tokens * top_k

    def padded(offset_E1: Tensor) -> float:
        return float((-offset_E1.diff() % TILE).sum()) / pairs

    changed = float((rounded.added_E + rounded.dropped_E).sum()) / pairs
    formula = num_experts * TILE / (2 * pairs)
    return Padding(name, formula, padded(routed.offset_E1), padded(rounded.offset_E1), changed)


def report_padding(rows: list[Padding], save_as: str | None) -> None:
    lines = ["| case | formula | top-k | rounded | rows changed |", "| --- | ---: | ---: | ---: | ---: |"]
    lines += [
        f"| {row.case} | {row.formula:.2%} | {row.before:.2%} | {row.after:.2%} | {row.rows_changed:.2%} |"
        for row in rows
    ]
    where = machine()
    head = ["# padded rows", "", *(f"- {key}: {value}" for key, value in where.items()), ""]
    text = "\n".join([*head, *lines, ""])
    sys.stdout.write(text)
    if save_as is not None:
        stem = RESULTS / f"rounding_padding_{save_as}_{time.strftime('%Y%m')}"
        stem.with_suffix(".md").write_text(text)
        values = {"machine": where, "rows": [asdict(row) for row in rows]}
        stem.with_suffix(".json").write_text(json.dumps(values, indent=1))


def main() -> None:
    chosen = arguments(__doc__ or "")
    report("round_pairs", [bench(name, chosen.rounds) for name in SHAPES], save_as=chosen.save_as)
    report_padding([padding(name) for name in SHAPES], chosen.save_as)


if __name__ == "__main__":
    main()
