"""The kernels alone, in your own model: route tokens, run their experts, and hold both to a loop in plain torch.

    python launch/examples/expert_mlp.py [--tokens 512] [--experts 8] [--top-k 2] [--dtype bfloat16]

Shapes: T tokens, D width, F expert width, E experts, K experts per token, N = T K (token, expert) pairs.
"""

import argparse

import torch
from torch import Tensor
from torch.nn import functional

from moetrain.ops import expert_mlp, route


def moe(x_TD: Tensor, router_ED: Tensor, w_in: Tensor, w_out: Tensor, top_k: int) -> Tensor:
    """Sum of each token's experts, by two operators. w_in is [E, 2, F, D] (gate, up), w_out is [E, D, F]."""
    routed = route(logits(x_TD, router_ED), top_k)  # softmax, top-k, weights that sum to 1
    return expert_mlp(x_TD, routed.token_N, routed.weight_N, routed.offset_E1, w_in, w_out)


def moe_by_loop(x_TD: Tensor, router_ED: Tensor, w_in: Tensor, w_out: Tensor, top_k: int) -> Tensor:
    """The same, one expert after another."""
    weight_TK, expert_id_TK = logits(x_TD, router_ED).softmax(-1).topk(top_k)
    weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    y_TD = torch.zeros_like(x_TD)
    for expert_id in range(w_in.shape[0]):
        token_M, choice_M = torch.where(expert_id_TK == expert_id)
        gate_MF, up_MF = (x_TD[token_M] @ w_in[expert_id].flatten(0, 1).T).chunk(2, dim=-1)
        out_MD = (functional.silu(gate_MF) * up_MF) @ w_out[expert_id].T
        y_TD = y_TD.index_add(0, token_M, (weight_TK[token_M, choice_M, None] * out_MD).to(y_TD.dtype))
    return y_TD


def logits(x_TD: Tensor, router_ED: Tensor) -> Tensor:
    """The router's scores [T, E], in at least float32."""
    at_least_fp32 = torch.promote_types(x_TD.dtype, torch.float32)
    return x_TD.to(at_least_fp32) @ router_ED.to(at_least_fp32).T


def worst(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Largest difference, as a share of the largest element of its tensor."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    """Compare outputs and every gradient; exits with 1 where they differ by more than rounding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 512), ("width", 128), ("hidden", 64), ("experts", 8), ("top-k", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float64"), default="float32")
    chosen = parser.parse_args()
    dtype = getattr(torch, chosen.dtype)
    torch.manual_seed(0)
    t, d, f, e = chosen.tokens, chosen.width, chosen.hidden, chosen.experts
    shapes = {"x": (t, d), "router": (e, d), "w_in": (e, 2, f, d), "w_out": (e, d, f)}
    scales = {"x": 1.0, "router": d**-0.5, "w_in": d**-0.5, "w_out": f**-0.5}
    leaves = [(scales[name] * torch.randn(shape)).to(dtype).requires_grad_() for name, shape in shapes.items()]
    results = []
    for layer in (moe, moe_by_loop):
        y_TD = layer(*leaves, chosen.top_k)
        results.append([y_TD, *torch.autograd.grad(y_TD.square().sum(), leaves)])
    difference = worst(*results)
    print(f"{t} tokens, {e} experts, top-{chosen.top_k}, {chosen.dtype}: output and gradients differ from a loop's by "
          f"{difference:.1e} of their largest element")  # fmt: skip
    raise SystemExit(int(difference > {"bfloat16": 5e-2, "float32": 1e-5, "float64": 1e-12}[chosen.dtype]))


if __name__ == "__main__":
    main()
