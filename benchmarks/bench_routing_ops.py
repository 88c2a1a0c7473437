"""select_experts (and select_experts_backward), group_pairs and assign_seats against plain torch.

Run: python benchmarks/bench_routing_ops.py

Routers of real models: (experts, top-k, score), on 4096 tokens. Values are checked before anything is timed.
"""

from typing import Any

import torch
from timing import Row, arguments, compare, report
from torch import Tensor

from moetrain.ops import assign_seats, group_pairs, select_experts
from moetrain.ops.reference_assign_seats import assign_seats_reference
from moetrain.ops.reference_select_experts import select_experts_reference

NUM_TOKENS = 4096
SEATED_TOKENS, CHECKED_TOKENS = 8192, 512  # the definition is plain Python
ROUTERS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "OLMoE 64/8 softmax": (64, 8, {"renormalise": False}),
    "Mixtral 8/2 softmax": (8, 2, {}),
    "Qwen3-30B 128/8 softmax": (128, 8, {}),
    "DeepSeek-V3 256/8 sigmoid, 4 of 8 groups": (
        256,
        8,
        {"score": "sigmoid", "num_groups": 8, "groups_kept": 4, "scale": 2.5},
    ),
}


def usual_softmax_router(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What model code does where no order on ties is promised: softmax, topk, statistics."""
    prob_TE = logits_TE.softmax(-1, dtype=torch.float32)
    weight_TK, expert_id_TK = prob_TE.topk(top_k, -1)
    count_E = torch.bincount(expert_id_TK.flatten(), minlength=prob_TE.shape[1])
    return expert_id_TK, weight_TK / weight_TK.sum(-1, keepdim=True), prob_TE.sum(0), count_E


def sort_pairs(expert_id_P: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    pair_N = expert_id_P.sort(stable=True).indices
    return pair_N, torch.bincount(expert_id_P, minlength=num_experts).cumsum(0)


def bench_select(name: str, device: str, rounds: int) -> list[Row]:
    num_experts, top_k, options = ROUTERS[name]
    random = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(NUM_TOKENS, num_experts, generator=random).to(device).requires_grad_()
    ours = select_experts(logits_TE, top_k, **options)
    wanted = select_experts_reference(logits_TE, top_k, **options)
    assert torch.equal(ours.expert_id_TK, wanted.expert_id_TK)
    assert torch.equal(ours.count_GE, wanted.count_GE)
    torch.testing.assert_close(ours.weight_TK, wanted.weight_TK, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.prob_sum_GE, wanted.prob_sum_GE, rtol=1e-5, atol=1e-5)

    def step(select: Any) -> None:
        chosen = select(logits_TE, top_k, **options)
        (chosen.weight_TK.sum() + chosen.prob_sum_GE.square().sum()).backward()

    with torch.no_grad():
        forward = {
            "moetrain": lambda: select_experts(logits_TE, top_k, **options),
            "definition": lambda: select_experts_reference(logits_TE, top_k, **options),
            "softmax + topk": lambda: usual_softmax_router(logits_TE, top_k),
        }
        rows = [compare(f"{name}, forward", forward, rounds=rounds)]
    both = {"moetrain": lambda: step(select_experts), "definition": lambda: step(select_experts_reference)}
    return [*rows, compare(f"{name}, forward + backward", both, rounds=rounds)]


def bench_group(num_experts: int, top_k: int, device: str, rounds: int) -> Row:
    random = torch.Generator().manual_seed(0)
    expert_id_P = torch.randint(num_experts, (NUM_TOKENS * top_k,), generator=random, dtype=torch.int32).to(device)
    pair_N, offset_E1 = group_pairs(expert_id_P, num_experts)
    wanted_pair_N, wanted_end_E = sort_pairs(expert_id_P, num_experts)
    assert torch.equal(pair_N.long(), wanted_pair_N)
    assert torch.equal(offset_E1[1:].long(), wanted_end_E)
    competitors = {
        "moetrain": lambda: group_pairs(expert_id_P, num_experts),
        "stable sort": lambda: sort_pairs(expert_id_P, num_experts),
    }
    return compare(f"{num_experts} experts, {NUM_TOKENS * top_k} pairs", competitors, rounds=rounds)


def draw_seats(num_tokens: int, num_experts: int, top_k: int, seats_per_expert: int, num_groups: int) -> list[Tensor]:
    """Choices of skewed popularity; seats beyond each expert's first, drawn by it; any shares: int32 lists."""
    random = torch.Generator().manual_seed(0)
    popularity_E = torch.arange(1, num_experts + 1)[torch.randperm(num_experts, generator=random)] ** -0.8
    noise_TE = torch.rand(num_tokens, num_experts, generator=random).log()
    chosen_TE = torch.zeros(num_tokens, num_experts, dtype=torch.bool)
    chosen_TE.scatter_(1, (noise_TE / popularity_E).topk(top_k).indices, True)
    held_EG = torch.zeros(num_experts, num_groups, dtype=torch.bool)
    held_EG[torch.arange(num_experts), torch.arange(num_experts) % num_groups] = True
    weight_EG = popularity_E[:, None] * ~held_EG
    more = torch.multinomial(weight_EG.flatten(), (seats_per_expert - 1) * num_experts, generator=random)
    held_EG.view(-1)[more] = True
    holder_Z = held_EG.nonzero()[:, 1]
    share_Z = torch.randint(1, 1000, holder_Z.shape, generator=random)
    offset_E1, seat_offset_E1 = (torch.nn.functional.pad(x.sum(1).cumsum(0), (1, 0)) for x in (chosen_TE.T, held_EG))
    return [x.int() for x in (chosen_TE.T.nonzero()[:, 1], offset_E1, seat_offset_E1, holder_Z, share_Z)]


def deal_pairs(
    token_N: Tensor, offset_E1: Tensor, seat_offset_E1: Tensor, holder_Z: Tensor, share_Z: Tensor
) -> tuple[Tensor, Tensor]:
    """What is composed easily: each pair by itself gets a seat of its expert, in proportion to the shares."""
    expert_E = torch.arange(len(offset_E1) - 1, device=token_N.device)
    expert_N, expert_Z = (expert_E.repeat_interleave(x.diff()) for x in (offset_E1, seat_offset_E1))
    end_Z = share_Z.double().cumsum(0)
    begin_E1 = torch.nn.functional.pad(end_Z, (1, 0))[seat_offset_E1.long()]
    part_Z = (end_Z - begin_E1[expert_Z]) / begin_E1.diff()[expert_Z]
    place_N = (torch.arange(len(token_N), device=token_N.device) - offset_E1[expert_N]) * 0.6180339887 % 1
    seat_N = torch.searchsorted(expert_Z + part_Z, expert_N + place_N, right=True).clamp_(max=len(holder_Z) - 1)
    return seat_N.sort(stable=True).indices, torch.bincount(seat_N, minlength=len(holder_Z)).cumsum(0)


def rows_per_token(pair_N: Tensor, size_Z: Tensor, lists: list[Tensor]) -> float:
    """How many groups a token's experts are spread over, on average."""
    group_N = lists[3].long().repeat_interleave(size_Z.long())
    cell_N = lists[0].long()[pair_N.long()] * (1 << 20) + group_N
    return len(cell_N.unique()) / SEATED_TOKENS


def bench_seats(num_experts: int, top_k: int, seats_per_expert: int, num_groups: int, device: str, rounds: int) -> Row:
    options: dict[str, Any] = {"num_groups": num_groups, "source": 5, "domain_size": 8}
    few = draw_seats(CHECKED_TOKENS, num_experts, top_k, seats_per_expert, num_groups)
    wanted = assign_seats_reference(*few, num_tokens=CHECKED_TOKENS, **options)
    checked = assign_seats(*(x.to(device) for x in few), num_tokens=CHECKED_TOKENS, **options)
    assert all(torch.equal(mine.cpu(), theirs) for mine, theirs in zip(checked, wanted, strict=True))
    lists = [x.to(device) for x in draw_seats(SEATED_TOKENS, num_experts, top_k, seats_per_expert, num_groups)]
    pair_N, offset_Z1 = assign_seats(*lists, num_tokens=SEATED_TOKENS, **options)
    dealt_N, end_Z = deal_pairs(*lists)
    ours, alone = (
        rows_per_token(pairs, sizes, lists)
        for pairs, sizes in ((pair_N, offset_Z1.diff()), (dealt_N, torch.nn.functional.pad(end_Z, (1, 0)).diff()))
    )
    competitors = {
        "moetrain": lambda: assign_seats(*lists, num_tokens=SEATED_TOKENS, **options),
        "each pair alone": lambda: deal_pairs(*lists),
    }
    case = (
        f"{num_experts} experts, {len(lists[3])} seats, {len(pair_N)} pairs; rows a token {ours:.2f}, alone {alone:.2f}"
    )
    return compare(case, competitors, rounds=rounds)


def main() -> None:
    chosen = arguments(__doc__ or "")
    selections = [row for name in ROUTERS for row in bench_select(name, chosen.device, chosen.rounds)]
    report("select_experts", selections, save_as=chosen.save_as)
    groupings = [bench_group(*sizes, chosen.device, chosen.rounds) for sizes in ((8, 2), (64, 8), (256, 8))]
    report("group_pairs", groupings, save_as=chosen.save_as)
    seatings = [bench_seats(*sizes, chosen.device, chosen.rounds) for sizes in ((64, 8, 3, 32), (256, 8, 2, 64))]
    report("assign_seats", seatings, save_as=chosen.save_as)
    for row in seatings:
        print(f"{row.case}: {row.median_ms['moetrain'] * 1e6 / (SEATED_TOKENS * 8):.1f} ns a pair")


if __name__ == "__main__":
    main()
