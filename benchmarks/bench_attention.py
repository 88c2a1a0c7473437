"""causal_attention against torch's scaled_dot_product_attention on the CPU.

Run: python benchmarks/bench_attention.py --threads 1

The quick start's layer (4 rows of 512 tokens, 8 query and 4 key heads of 32) and a wider head (128), each with one
document per row and with documents of about 64 tokens. torch takes grouped heads as they are where plain causal
attention is right, else repeated heads and a mask, which is the only form its fused kernel takes. Values and gradients
are compared before anything is timed.
"""

from collections.abc import Callable

import torch
from timing import Row, arguments, compare, report
from torch import Tensor
from torch.nn import functional

from moetrain.ops import causal_attention

SHAPES = {"quickstart": (4, 512, 8, 4, 32), "head 128": (1, 2048, 8, 2, 128)}  # B, S, H, G, d
DOCUMENT = 64  # tokens, on average

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def first_tokens(num_rows: int, length: int, *, packed: bool) -> Tensor:
    """Where documents begin in their rows: one per row, or a new one at about every 64th token."""
    random = torch.Generator().manual_seed(1)
    begins_BS = torch.rand(num_rows, length, generator=random) < (1 / DOCUMENT if packed else 0)
    begins_BS[:, 0] = True
    return torch.where(begins_BS, torch.arange(length), 0).cummax(dim=1).values.to(torch.int32)


def torch_attention(first_BS: Tensor, *, packed: bool) -> Attend:
    num_rows, length = first_BS.shape
    token_S = torch.arange(length)
    mask_B1SS = ((token_S <= token_S[:, None]) & (token_S >= first_BS[:, :, None]))[:, None] if packed else None

    def attend(q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (num_rows, length)).transpose(1, 2) for x in (q_THd, k_TGd, v_TGd))
        if mask_B1SS is not None:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        y = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask_B1SS, is_causal=mask_B1SS is None, enable_gqa=mask_B1SS is None
        )
        return y.transpose(1, 2).flatten(0, 1)

    return attend


def bench(name: str, dtype: torch.dtype, rounds: int, *, packed: bool) -> list[Row]:
    num_rows, length, heads, key_heads, head_dim = SHAPES[name]
    random = torch.Generator().manual_seed(0)
    q, k, v, dy = (
        torch.randn(num_rows * length, n, head_dim, generator=random).to(dtype)
        for n in (heads, key_heads, key_heads, heads)
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    first_BS = first_tokens(num_rows, length, packed=packed)
    offset_R1 = length * torch.arange(num_rows + 1, dtype=torch.int32)
    first_T = (first_BS + offset_R1[:-1, None]).flatten()
    competitors: dict[str, Attend] = {
        "moetrain": lambda q, k, v: causal_attention(q, k, v, first_T, offset_R1),
        "torch sdpa": torch_attention(first_BS, packed=packed),
    }
    answers = [(y := attend(*leaves), *torch.autograd.grad(y, leaves, dy)) for attend in competitors.values()]
    for ours, theirs in zip(*answers, strict=True):
        bound = 16 * torch.finfo(dtype).eps * max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)

    def forward(attend: Attend) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: attend(q, k, v))

    def both(attend: Attend) -> Callable[[], object]:
        return lambda: torch.autograd.grad(attend(*leaves), leaves, dy)

    case = f"{name}, {'documents' if packed else 'one document'}, {str(dtype).removeprefix('torch.')}"
    return [
        compare(f"{case}, forward", {who: forward(attend) for who, attend in competitors.items()}, rounds=rounds),
        compare(
            f"{case}, forward + backward", {who: both(attend) for who, attend in competitors.items()}, rounds=rounds
        ),
    ]


def main() -> None:
    chosen = arguments(__doc__ or "")
    rows = []
    for name in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            for packed in (False, True):
                rows += bench(name, dtype, chosen.rounds, packed=packed)
    report("attention", rows, save_as=chosen.save_as)


if __name__ == "__main__":
    main()
