"""select_experts (and select_experts_backward), group_pairs against plain torch.

Run: python benchmarks/bench_routing_ops.py

Routers of real models: (experts, top-k, score), on 4096 tokens. Values are checked before anything is timed.
"""

from typing import Any

import torch
from timing import Row, arguments, compare, report
from torch import Tensor

from moetrain.ops import group_pairs, select_experts
from moetrain.ops.reference_select_experts import select_experts_reference

NUM_TOKENS = 4096
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


def main() -> None:
    chosen = arguments(__doc__ or "")
    selections = [row for name in ROUTERS for row in bench_select(name, chosen.device, chosen.rounds)]
    report("select_experts", selections, save_as=chosen.save_as)
    groupings = [bench_group(*sizes, chosen.device, chosen.rounds) for sizes in ((8, 2), (64, 8), (256, 8))]
    report("group_pairs", groupings, save_as=chosen.save_as)


if __name__ == "__main__":
    main()
