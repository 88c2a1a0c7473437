"""Layers that are cut over a tp group: what its ranks have and compute adds up to the whole layer.

Shapes: B rows, S tokens, T = B * S, D width, V vocabulary.
"""

import itertools
from typing import Any

import pytest
import torch
from known import grad_of
from models.whole import make_batch
from ranks import run_on_ranks
from torch import Tensor

from moetrain.config import ModelConfig
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.mesh.tensor_parallel import Cut, TensorParallel
from moetrain.models.attention import Attention, plan_attention
from moetrain.models.loss import linear_cross_entropy_sum
from moetrain.models.transformer import TokenEmbedding
from moetrain.moe.experts import SharedExpert


class OneOf(TensorParallel):
    """A rank of a group whose others are looked at one after another: every rank gets all tokens and gives its part."""

    def __init__(self, size: int, rank: int) -> None:
        object.__setattr__(self, "_size", size)
        super().__init__(rank=rank)

    @property
    def size(self) -> int:
        return int(object.__getattribute__(self, "_size"))

    def gather(self, x_tD: Tensor, num_tokens: int) -> Tensor:
        return x_tD

    def scatter_sum(self, x_TD: Tensor) -> Tensor:
        return x_TD


def part_of(whole: Tensor, cut: Cut | None) -> Tensor:
    return whole if cut is None else whole.narrow(cut.dim, cut.start, cut.size)


HEADS = [
    (kv_heads * group, kv_heads, tp)
    for kv_heads, group in itertools.product((1, 2, 3, 4, 5, 6), (1, 2, 3, 4))
    for tp in (2, 3, 4, 6, 8, 12)
    if kv_heads * group % tp == 0
]


def attend(config: ModelConfig, layer: Attention, x_TD: Tensor, rows: list[list[int]], weight_TD: Tensor) -> Tensor:
    y_TD = layer(x_TD, plan_attention(make_batch(rows), config, torch.float64))
    (y_TD * weight_TD).sum().backward()
    return y_TD.detach()


@pytest.mark.parametrize(("heads", "kv_heads", "tp"), HEADS)
@pytest.mark.parametrize("biased", [False, True])
def test_heads_of_all_ranks_add_up_to_the_whole_attention(heads: int, kv_heads: int, tp: int, biased: bool) -> None:
    """Whether key heads divide over the ranks, are fewer than they, or fall between two of them."""
    torch.manual_seed(heads * 100 + kv_heads * 10 + tp)
    config = ModelConfig(width=6, num_heads=heads, num_kv_heads=kv_heads, head_dim=4, qk_norm=biased, qkv_bias=biased)
    whole = Attention(config).double()
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter)
    rows = [[3, 2], [5]]
    x_TD, weight_TD = torch.randn(10, 6, dtype=torch.float64), torch.randn(10, 6, dtype=torch.float64)
    expected_TD = attend(config, whole, x_TD, rows, weight_TD)
    parameters = dict(whole.named_parameters())
    summed_TD = torch.zeros_like(expected_TD)
    grads = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for rank in range(tp):
        layer = Attention(config, OneOf(tp, rank)).double()
        cuts = layer.cuts()
        for name, parameter in layer.named_parameters():
            parameter.data = part_of(parameters[name].detach(), cuts.get(name)).clone()
        summed_TD += attend(config, layer, x_TD, rows, weight_TD)
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None
            part_of(grads[name], cuts.get(name)).add_(parameter.grad)
        assert ("k.weight" in cuts) == (kv_heads % tp == 0)
    torch.testing.assert_close(summed_TD, expected_TD, rtol=1e-11, atol=1e-11)
    for name, parameter in parameters.items():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("vocab_size", "tp"), [(7, 2), (7, 3), (8, 4), (3, 3)])
def test_rows_of_all_ranks_add_up_to_the_whole_embedding(vocab_size: int, tp: int) -> None:
    token_id_T = torch.arange(2 * vocab_size) % vocab_size
    rows_VD = (1.0 + torch.arange(vocab_size * 3)).view(vocab_size, 3)
    summed_TD = torch.zeros(2 * vocab_size, 3)
    for rank in range(tp):
        part = TokenEmbedding(vocab_size, 3, OneOf(tp, rank))
        part.weight.data = part_of(rows_VD, part.rows).clone()
        part_TD = part(token_id_T)
        summed_TD += part_TD.detach()
        part_TD.sum().backward()
        assert torch.equal(grad_of(part.weight), torch.full_like(part.weight, 2.0)), "each token is on two places, once"
    assert torch.equal(summed_TD, rows_VD[token_id_T])


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu2"])
@pytest.mark.parametrize(("hidden", "tp"), [(8, 2), (7, 3), (3, 3)])
def test_hidden_units_of_all_ranks_add_up_to_the_whole_mlp(activation: Any, hidden: int, tp: int) -> None:
    torch.manual_seed(hidden)
    whole = SharedExpert(5, hidden, activation, gate=False).double()
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter)
    x_TD = torch.randn(6, 5, dtype=torch.float64)
    parts = [SharedExpert(5, hidden, activation, gate=False, tp=OneOf(tp, rank)).double() for rank in range(tp)]
    for part in parts:
        part.w_in.data = part_of(whole.w_in.detach(), part.cuts()["w_in"])
        part.w_out.data = part_of(whole.w_out.detach(), part.cuts()["w_out"])
    summed_TD = torch.stack([part(x_TD) for part in parts]).sum(dim=0)
    torch.testing.assert_close(summed_TD, whole(x_TD), rtol=1e-12, atol=1e-12)
    assert sum(part.w_out.shape[1] for part in parts) == hidden


def loss_body(rank: int, vocab_size: int, num_tokens: int, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the gradient of the tokens summed over ranks, and that of this rank's rows of the head."""
    world = torch.distributed.get_world_size()
    groups = MeshGroups.create(FoldedMesh(tp=world, edp=world))
    tp = TensorParallel(groups.group("tp"), groups.group_rank("tp"))
    x_TD, w_VD, target_T = problem(vocab_size, num_tokens)
    rows = tp.cut(0, vocab_size)
    x_TD.requires_grad_()
    mine_VD = part_of(w_VD, rows).clone().requires_grad_()
    loss = linear_cross_entropy_sum(x_TD, mine_VD, target_T, chunk, tp=tp, rows=rows)
    (3.0 * loss).backward()
    grad_TD = tp.all_reduce(grad_of(x_TD).clone())
    groups.close()
    return loss.detach(), grad_TD, grad_of(mine_VD)


def problem(vocab_size: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits up to some hundred, so that a maximum over a part of them alone would overflow; every fourth is unused."""
    generator = torch.Generator().manual_seed(vocab_size + num_tokens)
    x_TD = 20 * torch.randn(num_tokens, 5, generator=generator, dtype=torch.float64)
    w_VD = 20 * torch.randn(vocab_size, 5, generator=generator, dtype=torch.float64)
    target_T = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    target_T[3::4] = -1
    return x_TD, w_VD, target_T


@pytest.mark.dist
@pytest.mark.parametrize(
    ("world", "vocab_size", "num_tokens", "chunk"), [(2, 7, 9, 4), (3, 7, 9, 100), (3, 3, 5, 1), (3, 11, 0, 4)]
)
def test_a_cut_vocabulary_gives_the_whole_loss(world: int, vocab_size: int, num_tokens: int, chunk: int) -> None:
    x_TD, w_VD, target_T = (
        tensor.requires_grad_(tensor.is_floating_point()) for tensor in problem(vocab_size, num_tokens)
    )
    expected = torch.nn.functional.cross_entropy(x_TD @ w_VD.T, target_T, ignore_index=-1, reduction="sum")
    (3.0 * expected).backward()
    answers: list[Any] = run_on_ranks(world, loss_body, vocab_size, num_tokens, chunk)
    for loss, grad_TD, _ in answers:
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grad_TD, x_TD.grad, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(torch.cat([grad for *_, grad in answers]), w_VD.grad, rtol=1e-11, atol=1e-11)
    assert [len(grad) for *_, grad in answers] != [vocab_size] * world
