import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moetrain.placement.chunks import ChunkLayout, ExpertShape

shapes = st.builds(ExpertShape, width=st.integers(1, 40), hidden=st.integers(1, 40), gated=st.booleans())


@given(shapes, st.integers(1, 9))
def test_slices_are_aligned_and_cover_the_expert_once(shape: ExpertShape, num_slices: int) -> None:
    layout = ChunkLayout(shape, num_slices)
    assert layout.slice_elems % 128 == 0
    assert layout.expert_elems == num_slices * layout.slice_elems
    covered: list[int] = []
    for slice_idx in range(num_slices):
        start, stop = layout.slice_range(slice_idx)
        assert 0 <= stop - start <= layout.slice_elems
        assert start == min(slice_idx * layout.slice_elems, shape.num_parameters)
        covered += range(start, stop)
    assert covered == list(range(shape.num_parameters))


@given(shapes)
def test_the_logical_vector_is_w_in_then_w_out(shape: ExpertShape) -> None:
    flat = torch.arange(shape.num_parameters + 3)
    w_in, w_out = shape.split(flat)
    assert tuple(w_in.shape) == shape.w_in_shape == ((2 if shape.gated else 1), shape.hidden, shape.width)
    assert tuple(w_out.shape) == shape.w_out_shape == (shape.width, shape.hidden)
    assert torch.equal(torch.cat([w_in.flatten(), w_out.flatten()]), flat[:-3])
    assert w_in.data_ptr() == flat.data_ptr()


def test_a_small_expert_in_three_slices() -> None:
    layout = ChunkLayout(ExpertShape(width=8, hidden=10, gated=True), 3)
    assert layout.shape.num_parameters == 240
    assert layout.slice_elems == 128
    assert [layout.slice_range(slice_idx) for slice_idx in range(3)] == [(0, 128), (128, 240), (240, 240)]


def test_errors() -> None:
    with pytest.raises(ValueError, match="expert width must be at least 1, got 0"):
        ExpertShape(0, 4, True)
    with pytest.raises(ValueError, match="num_slices must be at least 1, got 0"):
        ChunkLayout(ExpertShape(4, 4, True), 0)
    with pytest.raises(ValueError, match="slice must be between 0 and 1, got 2; there are 2 slices"):
        ChunkLayout(ExpertShape(4, 4, True), 2).slice_range(2)
    with pytest.raises(ValueError, match="of width 4 and hidden width 2 has 24 parameters, got a vector of 23"):
        ExpertShape(4, 2, True).split(torch.zeros(23))
