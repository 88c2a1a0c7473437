"""Scored tokens and their pairs, for tests of rounding. Shapes: T tokens, E experts, K experts per token, W ranks."""

import dataclasses
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from moetrain.config.moe import RoundRule
from moetrain.ops import RoundedPairs, group_pairs, offer_pairs, round_pairs, select_experts
from moetrain.ops.reference_round_pairs import round_pairs_reference

RULES: tuple[RoundRule, ...] = ("nearest", "stochastic", "nearest_score", "balance", "up", "down")


def on_cpu(rounded: RoundedPairs) -> RoundedPairs:
    return RoundedPairs(*(getattr(rounded, field.name).cpu() for field in dataclasses.fields(RoundedPairs)))


@dataclasses.dataclass(eq=False)
class Case:
    """Scored tokens of W ranks; each rank's slice keeps its own pair list. The operators run on ``device``."""

    num_tokens: int
    num_experts: int
    top_k: int
    _: dataclasses.KW_ONLY
    seed: int = 0
    ranks: int = 1
    skew: float = 0.0
    distinct: int | None = None  # whole scores, so many of them: ties everywhere
    dtype: torch.dtype = torch.float32
    valid: bool = False  # whether some tokens are not
    device: str = "cpu"

    def __post_init__(self) -> None:
        random, num_tokens = torch.Generator().manual_seed(self.seed), self.num_tokens
        logits_TE = torch.randn(num_tokens, self.num_experts, generator=random, dtype=torch.float64).to(self.dtype)
        logits_TE = logits_TE + self.skew * torch.arange(self.num_experts)
        if self.distinct is not None:
            logits_TE = torch.randint(self.distinct, logits_TE.shape, generator=random).to(self.dtype)
        self.score_TE = logits_TE if self.distinct is not None else logits_TE.softmax(-1)
        self.valid_T = torch.rand(num_tokens, generator=random) < 0.8 if self.valid else None
        self.gid_T2 = torch.stack((torch.arange(num_tokens) // 5, torch.arange(num_tokens) % 5), 1)
        self.gid_T2 = self.gid_T2[torch.randperm(num_tokens, generator=random)]
        self.expert_id_TK = select_experts(logits_TE, self.top_k, valid_T=self.valid_T).expert_id_TK
        self.cuts = [num_tokens * rank // self.ranks for rank in range(self.ranks + 1)]

    def _chosen(self) -> Tensor:
        taken_TE1 = torch.zeros(len(self.score_TE), self.num_experts + 1, dtype=torch.bool)
        return taken_TE1.scatter_(1, self.expert_id_TK.long() % (self.num_experts + 1), True)[:, :-1]

    chosen_TE = property(_chosen)

    def parts(self) -> Iterator[tuple[Any, ...]]:
        """Each rank's (score, token, offset, gid, valid)."""
        for start, stop in pairwise(self.cuts):
            pair_N, offset_E1 = group_pairs(self.expert_id_TK[start:stop].reshape(-1), self.num_experts)
            token_N = (pair_N // self.top_k).int()
            valid_T = None if self.valid_T is None else self.valid_T[start:stop]
            part = self.score_TE[start:stop], token_N, offset_E1, self.gid_T2[start:stop], valid_T
            yield tuple(x if x is None else x.to(self.device) for x in part)

    def rounded(
        self, tile: int, rule: RoundRule, *, key: int = 0, holder_WE: Tensor | None = None
    ) -> list[RoundedPairs]:
        parts = list(self.parts())
        offers = [
            offer_pairs(score, token, offset, gid, tile, valid_T=valid) for score, token, offset, gid, valid in parts
        ]
        offers_WEX = torch.stack([offer.offers_EX for offer in offers])
        options: dict[str, Any] = {"key": key, "offers_WEX": offers_WEX}
        options["holder_WE"] = None if holder_WE is None else holder_WE.to(self.device)
        return [
            on_cpu(round_pairs(score, token, offset, offer, tile, rule, rank=rank, **options))
            for rank, ((score, token, offset, _, _), offer) in enumerate(zip(parts, offers, strict=True))
        ]

    def kept(self, tile: int, rule: RoundRule, **options: Any) -> Tensor:
        """All ranks' pairs after rounding, bool [T, E]."""
        kept_TE = torch.zeros_like(self.chosen_TE)
        for start, rounded in zip(self.cuts, self.rounded(tile, rule, **options), strict=False):
            expert_P = torch.repeat_interleave(torch.arange(self.num_experts), rounded.offset_E1.diff().long())
            kept_TE[start + rounded.token_P[: len(expert_P)].long(), expert_P] = True
        return kept_TE

    def expected(self, tile: int, rule: RoundRule, *, key: int = 0, holder_WE: Tensor | None = None) -> Tensor:
        holder_TE = None
        if holder_WE is not None:
            rank_T = torch.repeat_interleave(torch.arange(len(self.cuts) - 1), torch.tensor(self.cuts).diff())
            holder_TE = holder_WE[rank_T].long()
        return round_pairs_reference(
            self.score_TE, self.chosen_TE, self.gid_T2, tile, rule, key=key, valid_T=self.valid_T, holder_TE=holder_TE
        )
