"""Attention and norms against their formulas, one query at a time."""

import cmath
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from models.whole import make_batch
from torch import Tensor

from moetrain.config import ModelConfig
from moetrain.models import attention as models_attention
from moetrain.models.attention import (
    Attend,
    Attention,
    DocumentAttention,
    EachDocumentAttention,
    FlashDocumentAttention,
    plan_attention,
)
from moetrain.models.norm import RMSNorm
from moetrain.ops import rotate
from moetrain.ops.reference_causal_attention import causal_attention_reference
from moetrain.sequence import GangShare, PackedBatch, Piece
from moetrain.sequence.ring import Arriving

CONFIG = ModelConfig(width=12, num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=True, qkv_bias=True)
PLAIN = ModelConfig(width=12, num_heads=2, num_kv_heads=2, head_dim=6)


def _attention(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Attention:
    torch.manual_seed(1)
    attention = Attention(config).to(dtype)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention


def _norm(x: Tensor, norm: RMSNorm | None) -> Tensor:
    return x if norm is None else x / (x.square().mean() + norm.eps).sqrt() * norm.weight


def _turned(x_d: Tensor, position: int, theta: float) -> Tensor:
    half = len(x_d) // 2
    turns = [cmath.exp(1j * position * theta ** (-i / half)) for i in range(half)]
    z = torch.complex(x_d[:half], x_d[half:]) * torch.tensor(turns, dtype=torch.complex128)
    return torch.cat((z.real, z.imag))


def _by_definition(attention: Attention, config: ModelConfig, x_SD: Tensor) -> Tensor:
    """One document: one query and one head at a time, over the keys it may see."""
    size, group = config.head_dim, config.num_heads // config.num_kv_heads
    rows = []
    for i in range(len(x_SD)):
        heads = []
        for head in range(config.num_heads):
            own, shared = slice(head * size, (head + 1) * size), slice(head // group * size, (head // group + 1) * size)
            query = _turned(_norm(attention.q(x_SD[i])[own], attention.q_norm), i, config.rope_theta)
            keys = torch.stack(
                [
                    _turned(_norm(attention.k(x_SD[j])[shared], attention.k_norm), j, config.rope_theta)
                    for j in range(i + 1)
                ]
            )
            values = torch.stack([attention.v(x_SD[j])[shared] for j in range(i + 1)])
            heads.append((keys @ query / size**0.5).softmax(0) @ values)
        rows.append(attention.o(torch.cat(heads)))
    return torch.stack(rows)


ROWS = [[[7], [7]], [[3, 4], [7]], [[2, 3], [1, 1, 4]], [[5], [7]]]


@pytest.mark.parametrize("config", [CONFIG, PLAIN], ids=["grouped", "plain"])
@pytest.mark.parametrize("rows", ROWS)
def test_each_query_sees_its_documents_past(config: ModelConfig, rows: list[list[int]]) -> None:
    batch = make_batch(rows)
    attention = _attention(config)
    x_TD = torch.randn(batch.num_tokens, 12, dtype=torch.float64)
    got_TD = attention(x_TD, plan_attention(batch, config, torch.float64))
    for begin, end in pairwise(batch.offsets().tolist()):
        want_SD = _by_definition(attention, config, x_TD[begin:end])
        torch.testing.assert_close(got_TD[begin:end], want_SD, rtol=1e-10, atol=1e-12)
    joined = replace(batch, pieces=(Piece(0, 0, batch.num_tokens, 0),))
    wrong_TD = attention(x_TD, plan_attention(joined, config, torch.float64))
    assert (wrong_TD - got_TD).abs().max() > 1e-3


def flash_attention(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """What torch's FlashAttention gives for causal segments, but for its rounding."""
    ends_k, longest, longest_k, dropout, causal, _ = rest
    assert torch.equal(ends, ends_k)
    assert ends.dtype == torch.int32
    assert longest == longest_k == int(ends.diff().max())
    assert (dropout, causal) == (0.0, True)
    first = torch.repeat_interleave(ends[:-1], ends.diff().long())
    return causal_attention_reference(q, k, v, first), torch.empty(0)


@pytest.mark.parametrize("config", [CONFIG, PLAIN], ids=["grouped", "plain"])
@pytest.mark.parametrize("rows", [*ROWS, []])
def test_accelerators_attend_alike(config: ModelConfig, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models_attention, "FLASH_ATTENTION", flash_attention)
    batch = make_batch(rows)
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    leaves = [torch.randn(batch.num_tokens, n, 6, dtype=torch.float64).requires_grad_() for n in heads]
    ways: list[Attend] = [
        plan_attention(batch, config, torch.float64).attend,
        EachDocumentAttention(batch.offsets().tolist()),
        FlashDocumentAttention(batch.offsets(), max((max(row) for row in rows), default=0)),
    ]
    assert isinstance(ways[0], DocumentAttention)
    weight_THd = torch.randn_like(leaves[0])

    def found(attend: Attend) -> list[Tensor]:
        """Results and gradients."""
        y_THd = attend(leaves[0], leaves[1], leaves[2], None)
        return [y_THd.detach(), *torch.autograd.grad((y_THd * weight_THd).sum(), leaves)]

    ours = found(ways[0])
    for other in ways[1:]:
        for mine, theirs in zip(ours, found(other), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)
    if len(batch.pieces) < 2:
        return
    ends = batch.offsets()[[0, *range(2, len(batch.pieces) + 1)]]  # the first two documents as one
    for joined in (EachDocumentAttention(ends.tolist()), FlashDocumentAttention(ends, int(ends.diff().max()))):
        errors = [(mine - theirs).abs().max() for mine, theirs in zip(ours, found(joined), strict=True)]
        assert min(errors) > 1e-3


def test_flash_attention_is_called_as_torch_declares_it() -> None:
    """Tensors without values: torch checks the arguments and gives shapes, also those of gradients."""
    batch = make_batch([[3, 4], [2]]).to("meta")
    attend = plan_attention(batch, CONFIG, torch.bfloat16).attend
    assert isinstance(attend, FlashDocumentAttention)
    leaves = [torch.empty(9, n, 8, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (4, 2, 2)]
    y_THd = attend(leaves[0], leaves[1], leaves[2], None)
    assert (y_THd.shape, y_THd.dtype) == ((9, 4, 8), torch.bfloat16)
    grads = torch.autograd.grad(y_THd.sum(), leaves)
    assert [grad.shape for grad in grads] == [(9, 4, 8), (9, 2, 8), (9, 2, 8)]
    attend.longest = "4"  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="argument 'max_q'"):
        attend(leaves[0], leaves[1], leaves[2], None)


def test_documents_begin_where_their_first_tokens_are() -> None:
    attend = plan_attention(make_batch([[3, 1], [200], [2]]), CONFIG, torch.float32).attend
    assert isinstance(attend, DocumentAttention)
    assert attend.first_T.dtype == attend.offset_R1.dtype == torch.int32
    assert attend.first_T.tolist() == [0] * 3 + [3] + [4] * 200 + [204] * 2
    assert attend.offset_R1.tolist() == [0, 204, 206]  # short documents share a row
    none = plan_attention(PackedBatch.empty(), CONFIG, torch.float32).attend
    assert isinstance(none, DocumentAttention)
    assert (none.first_T.tolist(), none.offset_R1.tolist()) == ([], [0])


def test_the_way_follows_from_device_and_type() -> None:
    batch = make_batch([[3, 4], [2]]).to("meta")
    flash, each = (plan_attention(batch, CONFIG, dtype).attend for dtype in (torch.bfloat16, torch.float32))
    assert isinstance(flash, FlashDocumentAttention)
    assert (flash.longest, flash.offset_P1.shape) == (4, (4,))
    assert isinstance(each, EachDocumentAttention)
    assert each.offsets == (0, 3, 7, 9)
    with pytest.raises(ValueError, match="a batch of a gang must come with the gang's ring"):
        plan_attention(replace(batch, gang=GangShare((3, 4, 2), (0,), 0)), CONFIG, torch.float32)


@pytest.mark.parametrize("config", [CONFIG, PLAIN], ids=["grouped", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_tokens_run_forward_and_backward(config: ModelConfig, dtype: torch.dtype) -> None:
    attention = _attention(config, dtype)
    x_TD = torch.zeros(0, 12, dtype=dtype, requires_grad=True)
    y_TD = attention(x_TD, plan_attention(PackedBatch.empty(), config, dtype))
    y_TD.sum().backward()
    assert y_TD.shape == x_TD.shape
    assert y_TD.dtype == dtype
    assert all(p.grad is not None and not p.grad.any() for p in attention.parameters())


class Silent:
    """A place in a ring of two that nothing is sent on."""

    rank, size = 1, 2

    def exchange(self, send: Tensor, receive: Tensor) -> Arriving:
        raise AssertionError("nothing is to be sent")


def test_angles_stay_exact_far_from_the_start() -> None:
    """The late part of a sequence, which rank 0 of a gang has beside the early one."""
    gang = GangShare((1_000_002,), (0, 1), 1)
    (_, begin, middle), (_, late, end) = gang.parts().pieces(1)
    token_T = torch.zeros(middle - begin + end - late, dtype=torch.int64)
    batch = PackedBatch(token_T, token_T, (Piece(0, begin, middle, 0), Piece(0, late, end, 0)), gang)
    plan = plan_attention(batch, CONFIG, torch.float32, Silent())
    x_1Hd, position = torch.randn(1, 1, 6), int(batch.positions()[-1])
    assert position > 700_000
    got_d = rotate(x_1Hd[None], plan.cos_Td[None, -1:], plan.sin_Td[None, -1:])[0, 0, 0]
    torch.testing.assert_close(
        got_d.double(), _turned(x_1Hd[0, 0].double(), position, CONFIG.rope_theta), rtol=1e-6, atol=1e-6
    )


def test_norm_computes_in_float32_and_keeps_float64() -> None:
    norm = RMSNorm(64, 1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 64, dtype=torch.float64) * 1e4  # squares overflow in half precision
    want = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm.double()(x), want, rtol=1e-12, atol=0)
    half = norm.half()(x.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.double(), want, rtol=2e-3, atol=1e-3)
