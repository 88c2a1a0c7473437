"""pack_chunks, unpack_chunks and add_sources against loops over single elements. Every comparison is exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.ops import add_sources, chunk_table, pack_chunks, unpack_chunks

OPS = torch.ops.moetrain
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
UNTOUCHED = -7.0  # exact in every type


def values(size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def copied(target: Tensor, source: Tensor, rows: list[tuple[int, int, int]]) -> Tensor:
    """What ``target`` should be: one element at a time, converted by torch."""
    out = target.clone()
    for start, destination, length in rows:
        for i in range(length):
            out[destination + i] = source[start + i].to(target.dtype)
    return out


def summed(target: Tensor, sources: list[Tensor], rows: list[tuple[int, int, int, int]]) -> Tensor:
    """What ``target`` should be: per element, terms in the order of the table, in the wide type, rounded at the end."""
    wide = torch.promote_types(torch.promote_types(target.dtype, sources[0].dtype), torch.float32)
    terms: dict[int, Tensor] = {}
    for which, start, destination, length in rows:
        for i in range(length):
            term = sources[which][start + i].to(wide)
            terms[destination + i] = terms[destination + i] + term if destination + i in terms else term
    out = target.clone()
    for place, total in terms.items():
        out[place] = total.to(target.dtype)
    return out


def same(actual: Tensor, expected: Tensor) -> bool:
    return actual.dtype == expected.dtype and torch.equal(actual, expected)


ROWS = [(5, 0, 3), (0, 10, 5), (2, 3, 0), (7, 4, 1), (30, 20, 13), (0, 6, 2), (43, 40, 0)]


@pytest.mark.parametrize("wire", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_chunks_travel_and_come_back(dtype: torch.dtype, wire: torch.dtype, device: str) -> None:
    source = values(43, dtype)
    covered = copied(torch.zeros(40, dtype=wire), source, ROWS)
    sent = pack_chunks(source.to(device), chunk_table(ROWS, 3, device), 40, wire)
    packed = sent.cpu()
    mask = copied(torch.zeros(40), torch.ones(43), ROWS).bool()
    assert same(packed[mask], covered[mask])

    back = [(destination, start, length) for start, destination, length in ROWS[1:5]]
    target = torch.full((43,), UNTOUCHED, dtype=dtype, device=device)
    unpack_chunks(target, sent, chunk_table(back, 3, device))
    target = target.cpu()
    assert same(target, copied(torch.full((43,), UNTOUCHED, dtype=dtype), packed, back))
    assert not torch.equal(target, torch.full_like(target, UNTOUCHED))


def test_bf16_is_rounded_as_torch_does() -> None:
    every = torch.arange(0, 1 << 32, 4097, dtype=torch.int64).to(torch.int32).view(torch.float32)  # NaN, Inf, subnormal
    ties = (torch.arange(1 << 16, dtype=torch.int64) << 16 | 0x8000).to(torch.int32).view(torch.float32)
    x = torch.cat((every, ties, ties.nextafter(torch.tensor(0.0)), torch.tensor([0.0, -0.0, torch.inf, -torch.inf])))
    packed = pack_chunks(x, chunk_table([(0, 0, x.numel())], 3), x.numel(), torch.bfloat16)
    numbers = ~x.isnan()
    assert torch.equal(packed[numbers].view(torch.int16), x.bfloat16()[numbers].view(torch.int16))
    assert packed[~numbers].isnan().all()
    assert not numbers.all()
    truncated = (x.view(torch.int32) >> 16).to(torch.int16)
    assert not torch.equal(packed[numbers].view(torch.int16), truncated[numbers])


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_large_chunks_on_any_number_of_threads(num_threads: int) -> None:
    before = torch.get_num_threads()
    source, other = values(300_001), values(300_001, seed=1)
    rows = [(1, 200_000, 100_001), (100_002, 0, 150_003), (0, 150_003, 0), (250_005, 150_003, 49_996)]
    try:
        torch.set_num_threads(num_threads)
        packed = pack_chunks(source, chunk_table(rows, 3), 300_001, torch.bfloat16)
        terms = [(which, start, destination, length) for start, destination, length in rows for which in (1, 0, 1)]
        total = torch.full((300_001,), UNTOUCHED)
        add_sources(total, [source, other], chunk_table(terms, 4))
    finally:
        torch.set_num_threads(before)
    for start, destination, length in rows:
        taken, put = slice(start, start + length), slice(destination, destination + length)
        assert torch.equal(packed[put], source[taken].bfloat16())
        assert torch.equal(total[put], (other[taken] + source[taken]) + other[taken])
    assert torch.equal(total[199_999:200_000], torch.full((1,), UNTOUCHED))


def test_the_order_of_the_table_is_the_order_of_the_sum(device: str) -> None:
    terms = [torch.full((5,), value, device=device) for value in (2.0**24, 1.0, -(2.0**24))]
    for order, total in (((0, 1, 2), 0.0), ((0, 2, 1), 1.0), ((1, 0, 2), 0.0), ((2, 0, 1), 1.0)):
        target = torch.full((7,), UNTOUCHED, device=device)
        add_sources(target, terms, chunk_table([(which, 0, 1, 5) for which in order], 4, device))
        assert target.tolist() == [UNTOUCHED, *[total] * 5, UNTOUCHED]


def test_sums_are_rounded_once(device: str) -> None:
    term = torch.full(
        (3,), 2.0**-8, dtype=torch.bfloat16, device=device
    )  # half a step at one: added one by one, each would be lost
    one, target = torch.ones_like(term), torch.empty_like(term)
    add_sources(target, [one, term], chunk_table([(0, 0, 0, 3), (1, 0, 0, 3), (1, 0, 0, 3)], 4, device))
    assert target.tolist() == [1 + 2.0**-7] * 3
    assert ((one + term) + term).tolist() == [1.0] * 3


@pytest.mark.parametrize("to", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_sums_of_any_types(dtype: torch.dtype, to: torch.dtype, device: str) -> None:
    sources = [values(20, dtype, seed) for seed in range(3)]
    rows = [(0, 0, 9, 4), (2, 3, 9, 4), (1, 10, 9, 4), (1, 2, 0, 9), (0, 1, 15, 0), (0, 0, 15, 1), (2, 7, 13, 2)]
    target = torch.full((16,), UNTOUCHED, dtype=to)
    expected = summed(target, sources, rows)
    target = target.to(device)
    add_sources(target, [source.to(device) for source in sources], chunk_table(rows, 4, device))
    target = target.cpu()
    assert same(target, expected)
    turned = summed(torch.full((16,), UNTOUCHED, dtype=to), sources[::-1], rows)
    assert not torch.equal(target, turned)


def test_nothing_to_do() -> None:
    empty = chunk_table([], 3)
    assert list(empty.shape) == [0, 3]
    assert pack_chunks(torch.empty(0), empty, 0, torch.bfloat16).shape == (0,)
    assert pack_chunks(values(4), empty, 3, torch.float32).shape == (3,)
    target = values(4)
    unpack_chunks(target, torch.empty(0), chunk_table([(0, 4, 0), (0, 0, 0)], 3))
    add_sources(target, [torch.empty(0)], chunk_table([(0, 0, 2, 0)], 4))
    add_sources(target, [torch.empty(0)], chunk_table([], 4))
    assert torch.equal(target, values(4))


def test_any_shape_counts_from_its_first_element() -> None:
    source = values(24).view(2, 3, 4)
    target = torch.zeros(2, 6)
    unpack_chunks(target[1], source, chunk_table([(20, 2, 4)], 3))
    assert torch.equal(target[1], torch.cat((torch.zeros(2), source[1, 2])))


@st.composite
def tables(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, int, int]]]:
    """Source size, target size, and chunks whose destinations do not overlap, in any order."""
    lengths = draw(st.lists(st.integers(0, 9), max_size=6))
    source_size = max(lengths, default=0) + draw(st.integers(0, 5))
    rows, end = [], 0
    for length in lengths:
        end += draw(st.integers(0, 3))
        rows.append((draw(st.integers(0, source_size - length)), end, length))
        end += length
    return source_size, end + draw(st.integers(0, 3)), draw(st.permutations(rows))


@settings(max_examples=100, deadline=None)
@given(tables(), st.sampled_from(FLOATS), st.sampled_from(FLOATS), st.data())
def test_any_table(
    case: tuple[int, int, list[tuple[int, int, int]]], dtype: torch.dtype, to: torch.dtype, data: st.DataObject
) -> None:
    source_size, target_size, rows = case
    sources = [values(source_size, dtype, seed) for seed in range(3)]
    target = torch.full((target_size,), UNTOUCHED, dtype=to)
    expected = copied(target, sources[0], rows)
    unpack_chunks(target, sources[0], chunk_table(rows, 3))
    assert same(target, expected)

    terms = []
    for start, destination, length in rows:
        for which in data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=4)):
            terms.append((which, start, destination, length))
    target = torch.full((target_size,), UNTOUCHED, dtype=to)
    expected = summed(target, sources, terms)
    add_sources(target, sources, chunk_table(terms, 4))
    assert same(target, expected)


BAD_ROWS = [
    ((-1, 0, 2), "chunk 1 must lie inside the source of 8 elements, got offset -1 and length 2"),
    ((7, 0, 2), "chunk 1 must lie inside the source of 8 elements, got offset 7 and length 2"),
    ((0, 9, 2), "chunk 1 must lie inside the target of 10 elements, got offset 9 and length 2"),
    ((0, 0, -1), "chunk 1 must lie inside the source of 8 elements, got offset 0 and length -1"),
    ((0, 0, 2**62), "chunk 1 must lie inside the source"),
    ((2**62, 0, 2), "chunk 1 must lie inside the source"),
    ((0, 3, 2), "destinations must not overlap, but chunk 1 ends at 5 and chunk 0 begins at 4"),
    ((0, 5, 1), "destinations must not overlap, but chunk 0 ends at 6 and chunk 1 begins at 5"),
]


@pytest.mark.parametrize(("row", "text"), BAD_ROWS)
def test_wrong_tables_are_refused(row: tuple[int, int, int], text: str) -> None:
    source = values(8)
    table = chunk_table([(0, 4, 2), row], 3)
    with pytest.raises(ValueError, match=f"pack_chunks: {text}"):
        pack_chunks(source, table, 10, torch.float32)
    target = torch.full((10,), UNTOUCHED)
    with pytest.raises(ValueError, match=f"unpack_chunks_: {text}"):
        unpack_chunks(target, source, table)
    with pytest.raises(ValueError, match=f"add_sources_: {text}"):
        add_sources(target, [source], torch.cat((torch.zeros(2, 1, dtype=torch.int64), table), 1))
    assert target.tolist() == [UNTOUCHED] * 10


def test_sums_that_overlap_are_refused() -> None:
    target, source = torch.zeros(10), values(8)
    apart = chunk_table([(0, 0, 4, 2), (0, 0, 6, 2), (0, 2, 4, 2)], 4)
    with pytest.raises(ValueError, match="put rows of one destination and length next to each other"):
        add_sources(target, [source], apart)
    with pytest.raises(ValueError, match="destinations must not overlap, but chunk 0 ends at 6 and chunk 1 begins at"):
        add_sources(target, [source], chunk_table([(0, 0, 4, 2), (0, 0, 4, 1)], 4))
    with pytest.raises(ValueError, match=r"chunk 0 must come from a source in \[0, 1\), got 1"):
        add_sources(target, [source], chunk_table([(1, 0, 0, 2)], 4))


@pytest.mark.parametrize("dtype", FLOATS)
def test_large_chunks_at_odd_places(dtype: torch.dtype, device: str) -> None:
    """Heads and tails of vectors, and more blocks than one: what a kernel does beyond its first elements."""
    source = values(300_007, dtype)
    rows = [(1, 3, 100_003), (200_001, 100_006, 8), (150_000, 100_017, 99_990)]
    target = torch.full((200_011,), UNTOUCHED, dtype=dtype, device=device)
    unpack_chunks(target, source.to(device), chunk_table(rows, 3, device))
    expected = torch.full((200_011,), UNTOUCHED, dtype=dtype)
    for start, destination, length in rows:
        expected[destination : destination + length] = source[start : start + length]
    assert same(target.cpu(), expected)


def test_wrong_arguments_are_named() -> None:
    x, table = values(8), chunk_table([(0, 0, 2)], 3)
    with pytest.raises(ValueError, match="chunk_table: row 1 must have 3 columns, got 2"):
        chunk_table([(0, 0, 2), (1, 2)], 3)
    with pytest.raises(TypeError, match="pack_chunks: source must be float32, bfloat16, float16 or float64, got Int"):
        pack_chunks(x.int(), table, 2, torch.float32)
    with pytest.raises(TypeError, match="pack_chunks: dtype must be float32, bfloat16, float16 or float64, got Long"):
        pack_chunks(x, table, 2, torch.int64)
    with pytest.raises(TypeError, match="pack_chunks: table must be Long, got Int"):
        pack_chunks(x, table.int(), 2, torch.float32)
    with pytest.raises(ValueError, match=r"table must be \[N, 3\] \(source, destination, length\), got \[3\]"):
        pack_chunks(x, table[0], 2, torch.float32)
    with pytest.raises(ValueError, match="pack_chunks: size must be at least 0, got -1"):
        pack_chunks(x, table, -1, torch.float32)
    with pytest.raises(ValueError, match="unpack_chunks_: target must be contiguous"):
        unpack_chunks(values(8)[::2], x, table)
    with pytest.raises(ValueError, match="unpack_chunks_: source and the target must not share memory; write into"):
        unpack_chunks(x[:5], x[4:], table)
    with pytest.raises(ValueError, match="add_sources_: a source and the target must not share memory"):
        add_sources(x, [values(8), x], chunk_table([(0, 0, 0, 2)], 4))
    with pytest.raises(ValueError, match="sources must be 1 to 16 tensors, got 17; receive messages into one tensor"):
        add_sources(x, [values(8)] * 17, chunk_table([(0, 0, 0, 2)], 4))
    with pytest.raises(ValueError, match="sources must be 1 to 16 tensors, got 0"):
        OPS.add_sources_(x, [], chunk_table([], 4))
    with pytest.raises(TypeError, match="add_sources_: each source must be Float, got Double"):
        add_sources(x, [values(8), values(8).double()], chunk_table([(0, 0, 0, 2)], 4))


def test_registration() -> None:
    x, target = values(8), torch.zeros(9, dtype=torch.bfloat16)
    table = chunk_table([(0, 3, 5), (1, 0, 3), (0, 8, 1)], 3)
    torch.library.opcheck(OPS.pack_chunks.default, (x, table, 9, torch.bfloat16))
    torch.library.opcheck(OPS.unpack_chunks_.default, (target, x, table))
    sums = chunk_table([(0, 0, 3, 5), (1, 0, 3, 5)], 4)
    torch.library.opcheck(OPS.add_sources_.default, (target, [x, values(8)], sums))
