"""route against what torch code does to get pairs grouped by expert, and against our own operators one by one.

Run: python benchmarks/bench_router.py --threads 1 --json out.json

From float32 logits to (token, weight, offsets, summed probabilities), softmax and renormalised top-k, at the shapes of
kernel_shapes.toml. Pairs, offsets, weights and gradients are compared before anything is timed.

- torch sort: softmax, topk, renormalise, a stable argsort of the chosen ids, bincount.
- one-hot mask: softmax, topk, renormalise, a one-hot mask [E, K, T] read expert by expert, as in transformers.
- unfused: select_experts, group_pairs, gather_rows.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from shapes import Shape, choose_shapes
from timing import Row, compare, machine, report
from torch import Tensor
from torch.nn import functional

from moetrain.ops import gather_rows, group_pairs, route, select_experts

DEFAULT_SHAPES = ("all-cpu", "7B-f256")  # the mask takes seconds per turn at the larger ones

Pairs = tuple[Tensor, Tensor, Tensor, Tensor]  # token_N, weight_N, end_E, prob_sum_E
Router = Callable[[Tensor, int], Pairs]


def fused(logits_TE: Tensor, top_k: int) -> Pairs:
    routed = route(logits_TE, top_k)
    return routed.token_N, routed.weight_N, routed.offset_E1[1:], routed.prob_sum_GE[0]


def unfused(logits_TE: Tensor, top_k: int) -> Pairs:
    chosen = select_experts(logits_TE, top_k)
    pair_N, offset_E1 = group_pairs(chosen.expert_id_TK.view(-1), logits_TE.shape[1])
    weight_N = gather_rows(chosen.weight_TK.reshape(-1, 1), pair_N, offset_E1).squeeze(1)
    return torch.div(pair_N, top_k, rounding_mode="floor"), weight_N, offset_E1[1:], chosen.prob_sum_GE[0]


def chosen_by_torch(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    prob_TE = logits_TE.softmax(-1)
    weight_TK, expert_id_TK = prob_TE.topk(top_k, dim=-1)
    return expert_id_TK, weight_TK / weight_TK.sum(-1, keepdim=True), prob_TE.sum(0)


def torch_sort(logits_TE: Tensor, top_k: int) -> Pairs:
    expert_id_TK, weight_TK, prob_sum_E = chosen_by_torch(logits_TE, top_k)
    expert_id_N = expert_id_TK.flatten()
    order_N = expert_id_N.argsort(stable=True)
    end_E = torch.bincount(expert_id_N, minlength=logits_TE.shape[1]).cumsum(0)
    return order_N // top_k, weight_TK.flatten()[order_N], end_E, prob_sum_E


def one_hot_mask(logits_TE: Tensor, top_k: int) -> Pairs:
    expert_id_TK, weight_TK, prob_sum_E = chosen_by_torch(logits_TE, top_k)
    mask_EKT = functional.one_hot(expert_id_TK, logits_TE.shape[1]).permute(2, 1, 0)
    place_EN = [torch.where(mask_KT) for mask_KT in mask_EKT]
    token_N = torch.cat([token for _, token in place_EN])
    weight_N = weight_TK[token_N, torch.cat([k for k, _ in place_EN])]
    return token_N, weight_N, mask_EKT.sum((1, 2)).cumsum(0), prob_sum_E


ROUTERS: dict[str, Router] = {
    "moetrain": fused,
    "torch sort": torch_sort,
    "one-hot mask": one_hot_mask,
    "unfused": unfused,
}


def step(router: Router, logits_TE: Tensor, top_k: int, pull_TE: Tensor) -> Tensor:
    """Gradient of a weighted sum that pulls on each (token, expert) by its own factor."""
    token_N, weight_N, end_E, prob_sum_E = router(logits_TE, top_k)
    count_E = end_E.long().diff(prepend=end_E.new_zeros(1))
    expert_N = torch.arange(len(count_E), device=count_E.device).repeat_interleave(count_E)
    pull_N = pull_TE[token_N.long(), expert_N]
    return torch.autograd.grad([weight_N, prob_sum_E], logits_TE, [pull_N, pull_TE[0]])[0]


def require_equal(name: str, logits_TE: Tensor, top_k: int, pull_TE: Tensor) -> None:
    """Tokens of one expert are put in ascending order first, which a mask read per k does not give."""

    def ordered(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
        token_N, weight_N, end_E, prob_sum_E = (x.detach() for x in pairs)
        count_E = end_E.long().diff(prepend=end_E.new_zeros(1))
        expert_N = torch.arange(len(count_E), device=count_E.device).repeat_interleave(count_E)
        key_N = expert_N * len(logits_TE) + token_N.long()
        order_N = key_N.argsort()
        return key_N[order_N], weight_N[order_N], prob_sum_E

    mine, other = (ordered(ROUTERS[each](logits_TE, top_k)) for each in ("moetrain", name))
    assert torch.equal(mine[0], other[0]), name
    torch.testing.assert_close(mine[1:], other[1:], rtol=1e-5, atol=1e-6)
    gradients = [step(ROUTERS[each], logits_TE, top_k, pull_TE) for each in ("moetrain", name)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def bench(shape: Shape, device: str, rounds: int) -> list[Row]:
    random = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(shape.T, shape.E, generator=random).to(device).requires_grad_()
    pull_TE = torch.randn(shape.T, shape.E, generator=random).to(device)
    for name in ROUTERS:
        require_equal(name, logits_TE, shape.K, pull_TE)
    dweight_N, dprob_E = torch.randn(shape.num_pairs, generator=random).to(device), pull_TE[0]

    def both(router: Router) -> None:
        _, weight_N, _, prob_sum_E = router(logits_TE, shape.K)
        torch.autograd.grad([weight_N, prob_sum_E], logits_TE, [dweight_N, dprob_E])

    case = f"{shape.name}: T={shape.T} E={shape.E} K={shape.K}"
    with torch.no_grad():
        forward = {name: lambda router=router: router(logits_TE, shape.K) for name, router in ROUTERS.items()}
        rows = [compare(f"{case}, forward", forward, rounds=rounds)]
    steps = {name: lambda router=router: both(router) for name, router in ROUTERS.items()}
    return [*rows, compare(f"{case}, forward + backward", steps, rounds=rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="a name of kernel_shapes.toml, or all-cpu; may be repeated")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=11, help="turns per competitor")
    parser.add_argument("--json", type=Path, default=None, metavar="PATH")
    parser.add_argument("--save-as", default=None, metavar="TAG", help="writes results/route_<TAG>_<YYYYMM>.{md,json}")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    shapes = choose_shapes(chosen.shape or DEFAULT_SHAPES)
    rows = [row for shape in shapes for row in bench(shape, chosen.device, chosen.rounds)]
    report("route", rows, save_as=chosen.save_as)
    if chosen.json is not None:
        values = {"machine": machine(), "rows": [asdict(row) | {"ratios": row.ratios} for row in rows]}
        chosen.json.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
