import math
from itertools import pairwise

import pytest
import torch

from moetrain.config import ModelConfig
from moetrain.models import init
from moetrain.models.init import expert_values, flat_ranges, initial_values
from moetrain.placement.chunks import ExpertShape

CONFIG = ModelConfig(num_layers=8, init_std=0.02)


@pytest.mark.parametrize("cuts", [[0, 1000], [0, 1, 7, 500, 1000], [0, 0, 333, 333, 1000]])
def test_values_do_not_depend_on_how_they_are_cut(cuts: list[int]) -> None:
    whole = initial_values(CONFIG, "embed.weight", 0, 1000, 5)
    parts = [initial_values(CONFIG, "embed.weight", start, stop, 5) for start, stop in pairwise(cuts)]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(initial_values(CONFIG, "embed.weight", 1, 1001, 5), whole)


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("embed.weight", 0.02),
        ("layers.3.attn.q.weight", 0.02),
        ("layers.3.moe.router.weight", 0.02),
        ("layers.3.moe.experts.w_in", 0.02),
        ("layers.3.moe.shared.gate", 0.02),
        ("layers.3.attn.o.weight", 0.02 / 4),
        ("layers.3.moe.experts.w_out", 0.02 / 4),
        ("layers.3.mlp.w_out", 0.02 / 4),
    ],
)
def test_spread(name: str, std: float) -> None:
    values = initial_values(CONFIG, name, 0, 100_000, 5)
    assert values.dtype == torch.float32
    assert float(values.std()) == pytest.approx(std, rel=0.02)
    assert abs(float(values.mean())) < 4 * std / math.sqrt(100_000)


def test_norms_are_one_and_biases_zero() -> None:
    for name in ("final_norm.weight", "layers.0.attn_norm.weight", "layers.0.attn.q_norm.weight"):
        assert torch.equal(initial_values(CONFIG, name, 2, 6, 5), torch.ones(4))
    assert torch.equal(initial_values(CONFIG, "layers.0.attn.q.bias", 0, 3, 5), torch.zeros(3))


def test_seed_and_name_matter() -> None:
    values = [
        initial_values(CONFIG, name, 0, 64, seed)
        for name, seed in (("embed.weight", 5), ("embed.weight", 6), ("lm_head.weight", 5))
    ]
    assert not torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


def test_ranges_must_ascend() -> None:
    with pytest.raises(ValueError, match=r"embed.weight needs 0 <= start <= stop, got 3 and 2"):
        initial_values(CONFIG, "embed.weight", 3, 2, 5)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("span", [(0, 10), (5, 70), (60, 100), (0, 0), (72, 72), (100, 108), (0, 1000)])
def test_an_experts_values_are_its_part_of_the_stacked_tensors(gated: bool, span: tuple[int, int]) -> None:
    shape = ExpertShape(width=6, hidden=6, gated=gated)
    in_size, out_size = math.prod(shape.w_in_shape), math.prod(shape.w_out_shape)
    start, stop = min(span[0], shape.num_parameters), min(span[1], shape.num_parameters)
    w_in = initial_values(CONFIG, "layers.2.moe.experts.w_in", 0, 4 * in_size, 5).view(4, in_size)
    w_out = initial_values(CONFIG, "layers.2.moe.experts.w_out", 0, 4 * out_size, 5).view(4, out_size)
    values = expert_values(CONFIG, shape, 5)
    for expert in range(4):
        logical = torch.cat((w_in[expert], w_out[expert]))
        assert torch.equal(values(2, expert, torch.arange(start, stop)), logical[start:stop])
        backwards = torch.arange(start, stop).flip(0)
        assert torch.equal(values(2, expert, backwards), logical[backwards])
    assert not torch.equal(values(2, 0, torch.arange(8)), values(2, 1, torch.arange(8)))


@pytest.mark.parametrize(
    ("shape", "part", "offset"),
    [
        ((7, 4), (3, 4), (2, 0)),
        ((7,), (2,), (5,)),
        ((2, 6, 5), (2, 3, 5), (0, 3)),
        ((2, 6, 5), (1, 6, 5), (1, 0, 0)),
        ((2, 6, 5), (2, 6, 5), (0, 0, 0)),
        ((3, 4, 5), (2, 2, 2), (1, 1, 3)),
        ((7, 4), (0, 4), (7, 0)),
        ((1,), (1,), (0,)),
    ],
)
def test_flat_ranges_cover_a_box(shape: tuple[int, ...], part: tuple[int, ...], offset: tuple[int, ...]) -> None:
    offset = (*offset, *(0,) * (len(shape) - len(offset)))
    index = torch.arange(math.prod(shape)).view(shape)
    box = index[tuple(slice(start, start + size) for start, size in zip(offset, part, strict=True))]
    found = [number for start, stop in flat_ranges(shape, part, offset) for number in range(start, stop)]
    assert found == box.flatten().tolist()


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short ranges share a block, long ones fill several."""
    whole = initial_values(CONFIG, "embed.weight", 0, 1000, 5)
    monkeypatch.setattr(init, "_BLOCK", 7)
    ranges = [(3, 5), (5, 6), (6, 40), (100, 100), (90, 97), (0, 14), (999, 1000)]
    expected = torch.cat([whole[start:stop] for start, stop in ranges])
    assert torch.equal(init._values_of(CONFIG, "embed.weight", ranges, 5), expected)
    assert all(len(index_N) <= 7 for index_N in init._blocks(ranges))
