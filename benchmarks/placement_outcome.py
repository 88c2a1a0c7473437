"""What becomes of tokens under a plan: loads and rows, pair by pair or token by token.

Shapes: S sources, which are the G groups, T tokens of each, K experts per token, E experts, Z seats.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from placement_corpus import Corpus, Ints

from moetrain.ops.assign_seats import assign_seats
from moetrain.placement.placement import Placement


@dataclass(frozen=True, slots=True)
class SeatPlan:
    """Seats, ascending by (expert, holder), and what share of each source's pairs for the expert a seat gets."""

    offset_E1: Ints
    holder_Z: Ints
    share_SZ: Ints

    @staticmethod
    def of(placement: Placement) -> "SeatPlan":
        shares = [placement.shares(source).numpy() for source in range(placement.num_groups)]
        return SeatPlan(
            placement.offset_E1.numpy().astype(np.int64),
            placement.holder_Z.numpy().astype(np.int64),
            np.stack(shares).astype(np.int64),
        )

    @staticmethod
    def even(holders_E: list[list[int]], num_groups: int) -> "SeatPlan":
        """Every seat of an expert the same, for every source. Holders come in any order."""
        offset_E1 = np.cumsum([0, *map(len, holders_E)])
        holder_Z = np.concatenate([np.sort(holders) for holders in holders_E])
        return SeatPlan(offset_E1, holder_Z, np.ones((num_groups, len(holder_Z)), np.int64))

    @property
    def expert_Z(self) -> Ints:  # noqa: N802
        return np.repeat(np.arange(len(self.offset_E1) - 1), np.diff(self.offset_E1))

    def loads(self, count_SE: Ints) -> NDArray[np.float64]:
        """Expected pairs of each group: shares are not rounded."""
        total_SE = np.add.reduceat(self.share_SZ, self.offset_E1[:-1], axis=1)
        pairs_SZ = self.share_SZ / total_SE[:, self.expert_Z] * count_SE[:, self.expert_Z]
        return np.bincount(self.holder_Z, pairs_SZ.sum(0), len(self.share_SZ)).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one layer and step. Rows are those that leave their source; each counts once however many pairs it has."""

    load_G: NDArray[np.float64]  # pairs
    rows: float  # per token
    node_rows: float  # between nodes, per token
    hottest: float  # most incoming rows of a group over T
    near_SG: Ints  # rows from each source to each group of its own node
    far_SG: Ints

    @property
    def gap(self) -> float:
        """Highest load over the mean."""
        return float(self.load_G.max() / self.load_G.mean())


def by_token(corpus: Corpus, choice_STK: Ints, plan: SeatPlan) -> Outcome:
    """Seats are given by moetrain's ``assign_seats``."""
    seat_offset_E1, holder_Z = (torch.from_numpy(array.astype(np.int32)) for array in (plan.offset_E1, plan.holder_Z))
    seat_SN = []
    for source, (token_N, offset_E1) in enumerate(pairs_by_expert(corpus, choice_STK)):
        share_Z = torch.from_numpy(plan.share_SZ[source].astype(np.int32))
        pair_N, offset_Z1 = assign_seats(
            torch.from_numpy(token_N.astype(np.int32)),
            torch.from_numpy(offset_E1.astype(np.int32)),
            seat_offset_E1,
            holder_Z,
            share_Z,
            num_tokens=corpus.num_tokens,
            num_groups=corpus.num_groups,
            source=source,
            domain_size=corpus.groups_per_node,
        )
        seat_N = np.empty(len(token_N), np.int64)
        seat_N[pair_N.numpy()] = np.repeat(np.arange(len(plan.holder_Z)), np.diff(offset_Z1.numpy()))
        seat_SN.append(seat_N)
    return outcome(corpus, choice_STK, plan, seat_SN)


def by_pair(corpus: Corpus, choice_STK: Ints, plan: SeatPlan) -> Outcome:
    """Each pair for itself: an expert's pairs, shuffled, are cut in proportion to the shares of its seats."""
    random = np.random.default_rng(0)
    seat_SN = []
    for source, (token_N, offset_E1) in enumerate(pairs_by_expert(corpus, choice_STK)):
        seat_N = np.empty(len(token_N), np.int64)
        for expert in range(corpus.num_experts):
            begin, end = offset_E1[expert : expert + 2]
            first, last = plan.offset_E1[expert : expert + 2]
            part = plan.share_SZ[source, first:last].cumsum() / plan.share_SZ[source, first:last].sum()
            at = (random.permutation(end - begin) + random.random()) / max(1, end - begin)
            seat_N[begin:end] = first + np.minimum(np.searchsorted(part, at, side="right"), last - first - 1)
        seat_SN.append(seat_N)
    return outcome(corpus, choice_STK, plan, seat_SN)


def pairs_by_expert(corpus: Corpus, choice_STK: Ints) -> list[tuple[Ints, Ints]]:
    """Of each source: tokens grouped by expert, ascending, and where each expert's begin."""
    found = []
    for choice_TK in choice_STK:
        order_N = np.argsort(choice_TK.ravel(), kind="stable")
        count_E = np.bincount(choice_TK.ravel(), minlength=corpus.num_experts)
        found.append((order_N // corpus.top_k, np.concatenate([[0], np.cumsum(count_E)])))
    return found


def outcome(corpus: Corpus, choice_STK: Ints, plan: SeatPlan, seat_SN: list[Ints]) -> Outcome:
    """From the seat of every pair."""
    groups = np.arange(corpus.num_groups)
    goes_STG = np.zeros((corpus.num_groups, corpus.num_tokens, corpus.num_groups), bool)
    load_G = np.zeros(corpus.num_groups)
    for source, (token_N, _) in enumerate(pairs_by_expert(corpus, choice_STK)):
        holder_N = plan.holder_Z[seat_SN[source]]
        goes_STG[source, token_N, holder_N] = True
        load_G += np.bincount(holder_N, minlength=corpus.num_groups)
    rows_SG = goes_STG.sum(1)
    rows_SG[groups, groups] = 0
    same_SG = groups[:, None] // corpus.groups_per_node == groups // corpus.groups_per_node
    tokens = corpus.num_groups * corpus.num_tokens
    return Outcome(
        load_G,
        rows_SG.sum() / tokens,
        rows_SG[~same_SG].sum() / tokens,
        rows_SG.sum(0).max() / corpus.num_tokens,
        rows_SG * same_SG,
        rows_SG * ~same_SG,
    )


def least_load(count_E: NDArray[np.float64], owner_E: Ints, num_groups: int, slots: int) -> float:
    """No plan has a lower highest load: the linear relaxation of placement and split, by HiGHS; the mean without scipy.

    A group takes of an expert at most the part of it that it holds; parts that it does not own sum to ``slots``.
    """
    mean = float(count_E.sum() / num_groups)
    try:
        from scipy.optimize import linprog
        from scipy.sparse import coo_array
    except ImportError:
        return mean
    num_experts = len(count_E)
    part_EG = np.arange(num_experts * num_groups).reshape(num_experts, num_groups)  # what a group computes of an expert
    load = np.repeat(count_E / mean, num_groups)
    mine = np.zeros_like(part_EG, bool)
    mine[np.arange(num_experts), owner_E] = True
    group_X, num_parts = np.tile(np.arange(num_groups), num_experts), part_EG.size
    others = np.flatnonzero(~mine.ravel())
    rows = np.concatenate([group_X, np.arange(num_groups), num_groups + group_X[others]])
    columns = np.concatenate([np.arange(num_parts), np.full(num_groups, num_parts), others])
    values = np.concatenate([load, np.full(num_groups, -1.0), np.ones(len(others))])
    upper = coo_array((values, (rows, columns)), shape=(2 * num_groups, num_parts + 1))
    whole = coo_array(
        (np.ones(num_parts), (np.repeat(np.arange(num_experts), num_groups), np.arange(num_parts))),
        shape=(num_experts, num_parts + 1),
    )
    found = linprog(
        np.append(np.zeros(num_parts), 1.0),
        A_ub=upper.tocsr(),
        b_ub=np.concatenate([np.zeros(num_groups), np.full(num_groups, float(slots))]),
        A_eq=whole.tocsr(),
        b_eq=np.ones(num_experts),
        bounds=(0, None),
        method="highs",
    )
    if not found.success:
        raise RuntimeError(f"HiGHS gave no bound: {found.message}")
    return max(mean, float(found.fun) * mean)
