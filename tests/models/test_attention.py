"""Attention and norms against their formulas, one query at a time."""

import cmath

import pytest
import torch
from models.whole import make_batch
from torch import Tensor

from moetrain.config import ModelConfig
from moetrain.models.attention import Attention, AttentionPlan, _mask, plan_attention
from moetrain.models.norm import RMSNorm
from moetrain.ops import causal_attention, rotate

CONFIG = ModelConfig(width=12, num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=True, qkv_bias=True)
PLAIN = ModelConfig(width=12, num_heads=2, num_kv_heads=2, head_dim=6)


def _attention(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Attention:
    torch.manual_seed(1)
    attention = Attention(config).to(dtype)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention


def _attend(attention: Attention, x_BSD: Tensor, plan: AttentionPlan) -> Tensor:
    return attention(x_BSD.flatten(0, 1), plan).unflatten(0, x_BSD.shape[:2])


def _norm(x: Tensor, norm: RMSNorm | None) -> Tensor:
    return x if norm is None else x / (x.square().mean() + norm.eps).sqrt() * norm.weight


def _turned(x_d: Tensor, position: int, theta: float) -> Tensor:
    half = len(x_d) // 2
    turns = [cmath.exp(1j * position * theta ** (-i / half)) for i in range(half)]
    z = torch.complex(x_d[:half], x_d[half:]) * torch.tensor(turns, dtype=torch.complex128)
    return torch.cat((z.real, z.imag))


def _by_definition(
    attention: Attention, config: ModelConfig, x_SD: Tensor, document_S: Tensor, position_S: Tensor
) -> Tensor:
    """One query and one head at a time, over the keys it may see."""
    size, group = config.head_dim, config.num_heads // config.num_kv_heads
    rows = []
    for i in range(len(x_SD)):
        seen = [j for j in range(i + 1) if document_S[j] == document_S[i]]
        heads = []
        for head in range(config.num_heads):
            own, shared = slice(head * size, (head + 1) * size), slice(head // group * size, (head // group + 1) * size)
            query = _turned(_norm(attention.q(x_SD[i])[own], attention.q_norm), int(position_S[i]), config.rope_theta)
            keys = torch.stack(
                [
                    _turned(
                        _norm(attention.k(x_SD[j])[shared], attention.k_norm), int(position_S[j]), config.rope_theta
                    )
                    for j in seen
                ]
            )
            values = torch.stack([attention.v(x_SD[j])[shared] for j in seen])
            heads.append((keys @ query / size**0.5).softmax(0) @ values)
        rows.append(attention.o(torch.cat(heads)))
    return torch.stack(rows)


@pytest.mark.parametrize("config", [CONFIG, PLAIN], ids=["grouped", "plain"])
@pytest.mark.parametrize("rows", [[[7], [7]], [[3, 4], [7]], [[2, 3], [1, 1, 4]], [[5], [7]]])
def test_each_query_sees_its_documents_past(config: ModelConfig, rows: list[list[int]]) -> None:
    batch = make_batch(rows, 7)
    attention = _attention(config)
    x_BSD = torch.randn(2, 7, 12, dtype=torch.float64)
    plan = plan_attention(batch.position_BS, batch.document_BS, config, torch.float64)
    got_BSD = _attend(attention, x_BSD, plan)
    for row in range(2):
        want_SD = _by_definition(attention, config, x_BSD[row], batch.document_BS[row], batch.position_BS[row])
        valid_S = batch.valid()[row]
        torch.testing.assert_close(got_BSD[row][valid_S], want_SD[valid_S], rtol=1e-10, atol=1e-12)
    assert got_BSD.isfinite().all()
    wrong_position = plan_attention(batch.position_BS + batch.document_BS, batch.document_BS, config, torch.float64)
    wrong_document = plan_attention(batch.position_BS, torch.zeros_like(batch.document_BS), config, torch.float64)
    if any(len(lengths) > 1 for lengths in rows):
        # Positions are relative inside a document, so shifting a whole document may not matter; seeing another does.
        torch.testing.assert_close(_attend(attention, x_BSD, wrong_position)[batch.valid()], got_BSD[batch.valid()])
        assert (_attend(attention, x_BSD, wrong_document) - got_BSD)[batch.valid()].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("rows", "masked"), [([[7], [7]], False), ([[5], [3]], False), ([[3, 4]], True), ([[7], [3, 2]], True), ([], False)]
)
def test_a_mask_is_made_only_where_documents_meet(rows: list[list[int]], masked: bool) -> None:
    batch = make_batch(rows, 7)
    assert (_mask(batch.document_BS) is not None) is masked
    plan = plan_attention(batch.position_BS, batch.document_BS, CONFIG, torch.float32)
    assert plan.mask_B1SS is None  # on the CPU
    assert torch.equal(plan.first_BS, _by_hand(batch.document_BS))


def _by_hand(document_BS: Tensor) -> Tensor:
    first = [[row.index(document) for document in row] for row in document_BS.tolist()]
    return torch.tensor(first, dtype=torch.int32).reshape(document_BS.shape)


@pytest.mark.parametrize("config", [CONFIG, PLAIN], ids=["grouped", "plain"])
@pytest.mark.parametrize("rows", [[[7], [7]], [[3, 4], [7]], [[5], [7]]])
def test_accelerators_attend_alike(config: ModelConfig, rows: list[list[int]]) -> None:
    batch = make_batch(rows, 7)
    attention = _attention(config)
    q, k, v = (torch.randn(2, 7, n, 6, dtype=torch.float64) for n in (config.num_heads, *[config.num_kv_heads] * 2))
    mask_B1SS = _mask(batch.document_BS)
    theirs = attention._attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask_B1SS).transpose(1, 2)
    plan = plan_attention(batch.position_BS, batch.document_BS, config, torch.float64)
    ours = causal_attention(q, k, v, plan.first_BS)
    torch.testing.assert_close(ours[batch.valid()], theirs[batch.valid()], rtol=1e-12, atol=1e-12)


def test_padding_alone_in_a_row_is_finite_forward_and_backward() -> None:
    batch = make_batch([[2, 2], []], 7)
    attention = _attention(CONFIG)
    x_BSD = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    y_BSD = _attend(attention, x_BSD, plan_attention(batch.position_BS, batch.document_BS, CONFIG, torch.float64))
    y_BSD.square().sum().backward()
    assert y_BSD.isfinite().all()
    assert x_BSD.grad is not None
    assert x_BSD.grad.isfinite().all()


@pytest.mark.parametrize("config", [CONFIG, PLAIN], ids=["grouped", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_rows_run_forward_and_backward(config: ModelConfig, dtype: torch.dtype) -> None:
    batch = make_batch([], 7)
    attention = _attention(config, dtype)
    x_BSD = torch.zeros(0, 7, 12, dtype=dtype, requires_grad=True)
    y_BSD = _attend(attention, x_BSD, plan_attention(batch.position_BS, batch.document_BS, config, dtype))
    y_BSD.sum().backward()
    assert y_BSD.shape == x_BSD.shape
    assert y_BSD.dtype == dtype
    assert all(p.grad is not None and not p.grad.any() for p in attention.parameters())


def test_angles_stay_exact_far_from_the_start() -> None:
    position = 1_000_001
    x_BSHd = torch.randn(1, 1, 1, 6)
    plan = plan_attention(torch.tensor([[position]]), torch.zeros(1, 1, dtype=torch.int64), CONFIG, torch.float32)
    want_d = _turned(x_BSHd[0, 0, 0].double(), position, CONFIG.rope_theta)
    torch.testing.assert_close(
        rotate(x_BSHd, plan.cos_BSd, plan.sin_BSd)[0, 0, 0].double(), want_d, rtol=1e-6, atol=1e-6
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
