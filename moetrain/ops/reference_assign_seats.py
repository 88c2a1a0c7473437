"""Seats in plain Python: the definition that tests hold the native operator to. Shapes: as in ``assign_seats``."""

from fractions import Fraction
from math import ceil, gcd

import torch
from torch import Tensor

BLOCK = 256


def assign_seats_reference(
    token_N: Tensor,
    offset_E1: Tensor,
    seat_offset_E1: Tensor,
    holder_Z: Tensor,
    share_Z: Tensor,
    *,
    num_tokens: int,
    num_groups: int,
    source: int,
    domain_size: int,
) -> tuple[Tensor, Tensor]:
    """See ``moetrain.ops.assign_seats.assign_seats``."""
    token, offset, seats = token_N.tolist(), offset_E1.tolist(), seat_offset_E1.tolist()
    holder, share = holder_Z.tolist(), share_Z.tolist()
    quota: dict[tuple[int, int], int] = {}  # (block, seat)
    experts_of: list[dict[int, int]] = [{} for _ in range(num_tokens)]  # token -> expert -> place in the list
    for expert in range(len(offset) - 1):
        places = range(offset[expert], offset[expert + 1])
        here = range(seats[expert], seats[expert + 1])
        wanted = standard_seats(len(places), [share[seat] for seat in here], turn_of(source, expert))
        for place, idx in zip(places, wanted, strict=True):
            cell = (token[place] // BLOCK, here[idx])
            quota[cell] = quota.get(cell, 0) + 1
            experts_of[token[place]][expert] = place
    seat_of = [-1] * len(token)
    for t, left in enumerate(experts_of):

        def seat_at(group: int, expert: int, t: int = t) -> int | None:
            open_seats = (z for z in range(seats[expert], seats[expert + 1]) if quota.get((t // BLOCK, z), 0) > 0)
            return next((z for z in open_seats if holder[z] == group), None)

        group = source
        while left:
            for expert in list(left):
                if (seat := seat_at(group, expert)) is not None:
                    quota[t // BLOCK, seat] -= 1
                    seat_of[left.pop(expert)] = seat

            def worth(group: int, left: dict[int, int] = left) -> tuple[int, bool, int]:
                hits = sum(seat_at(group, expert) is not None for expert in left)
                return hits, group // domain_size == source // domain_size, -group

            group = max(range(num_groups), key=worth)
    places_of = [[place for place, seat in enumerate(seat_of) if seat == z] for z in (*range(len(holder)), -1)]
    counts = torch.tensor([0] + [len(places) for places in places_of[:-1]])
    return torch.tensor([place for places in places_of for place in places], dtype=torch.int32), counts.cumsum(0).int()


def turn_of(source: int, expert: int) -> Fraction:
    """In [0, 1): by how much the bounds of a source and expert are moved before they are rounded up."""
    return Fraction((source * 0x9E3779B1 + expert * 0x85EBCA77) % 2**32 // 2**16, 2**16)


def standard_seats(num_pairs: int, share: list[int], turn: Fraction) -> list[int]:
    """Of each of an expert's pairs, the index of the seat that it counts for in its block's quotas."""
    if num_pairs == 0:
        return []
    total = sum(share)
    bounds = [max(0, ceil(Fraction(num_pairs * sum(share[: idx + 1]), total) - turn)) for idx in range(len(share))]
    near = num_pairs * 40503 // 65536  # the golden ratio's share of them
    steps = (near + sign * step for step in range(num_pairs + 1) for sign in (1, -1))
    stride = next(stride for stride in steps if stride >= 0 and gcd(stride, num_pairs) == 1)
    return [sum(bound <= i * stride % num_pairs for bound in bounds) for i in range(num_pairs)]
