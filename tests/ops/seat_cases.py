"""Random pairs and seats for tests of assign_seats."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetrain.ops import assign_seats


@dataclass(frozen=True)
class Case:
    """Arguments of one call; ``listed`` are the five lists."""

    listed: tuple[Tensor, ...]
    options: dict[str, Any]

    def run(self, device: str = "cpu") -> tuple[Tensor, Tensor]:
        return assign_seats(*(one.to(device) for one in self.listed), **self.options)

    @property
    def pairs(self) -> int:
        return int(self.listed[1][-1])


def ints(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def case_of(
    seed: int,
    num_tokens: int = 200,
    num_experts: int = 8,
    top_k: int = 3,
    num_groups: int = 6,
    domain_size: int = 2,
    tail: int = 0,
    most_share: int = 9,
) -> Case:
    """Random choices, seats and shares."""
    rng = torch.Generator().manual_seed(seed)
    scores_TE = torch.rand(num_tokens, num_experts, generator=rng) ** torch.linspace(1, 4, num_experts)
    chosen_TE = torch.zeros(num_tokens, num_experts, dtype=torch.bool)
    chosen_TE.scatter_(1, scores_TE.topk(min(top_k, num_experts)).indices, True)
    token_N = chosen_TE.T.nonzero()[:, 1].int()
    offset_E1 = ints([0, *chosen_TE.sum(0).cumsum(0).tolist()])
    held_EG = torch.rand(num_experts, num_groups, generator=rng) < 0.5
    held_EG[torch.arange(num_experts), torch.randint(num_groups, (num_experts,), generator=rng)] = True
    holder_Z = held_EG.nonzero()[:, 1]
    share_Z = torch.randint(0, most_share + 1, (len(holder_Z),), generator=rng).int()
    first_E = held_EG.sum(1).cumsum(0) - held_EG.sum(1)
    share_Z[first_E] += 1
    seat_offset_E1 = ints([0, *held_EG.sum(1).cumsum(0).tolist()])
    filler = torch.full((tail,), 10**6, dtype=torch.int32)
    options: dict[str, Any] = {
        "num_tokens": num_tokens,
        "num_groups": num_groups,
        "source": seed % num_groups,
        "domain_size": domain_size,
    }
    return Case((torch.cat((token_N, filler)), offset_E1, seat_offset_E1, holder_Z.int(), share_Z), options)
