"""Collectives with values that encode source and destination."""

import pytest
import torch
import torch.distributed as dist
from known import grad_of, world_group
from ranks import run_on_ranks
from torch import Tensor

from moetrain.mesh import collectives
from moetrain.mesh.collectives import (
    all_reduce_sum,
    all_to_all_rows,
    exchange_counts,
    gather_rows_of_all,
    sum_rows_of_all,
)
from moetrain.mesh.traffic import TrafficCounter

pytestmark = pytest.mark.dist


def counts_matrix(kind: str, world_size: int) -> list[list[int]]:
    """[source][destination] rows."""
    full = [[(3 * source + 5 * dest) % 4 for dest in range(world_size)] for source in range(world_size)]
    if kind == "uneven":
        return full
    if kind == "nothing":
        return [[0] * world_size for _ in range(world_size)]
    if kind == "all to last":
        return [[0] * (world_size - 1) + [2] for _ in range(world_size)]
    return [[0] * world_size, *full[1:]]  # the first rank sends nothing


def row_value(source: int, dest: int, row: int) -> float:
    return 100.0 * source + 10.0 * dest + row


def send_rows(rank: int, matrix: list[list[int]], dtype: torch.dtype) -> tuple[Tensor, Tensor, TrafficCounter]:
    world_size = dist.get_world_size()
    send = matrix[rank]
    recv = [matrix[source][rank] for source in range(world_size)]
    values = [row_value(rank, dest, row) for dest in range(world_size) for row in range(send[dest])]
    x_RD = torch.tensor(values, dtype=dtype).view(-1, 1).repeat(1, 3).requires_grad_()
    counter = TrafficCounter()
    y_RD = all_to_all_rows(x_RD, send, recv, world_group(), counter=counter, purpose="combine")
    (y_RD * (rank + 1)).sum().backward()  # a gradient that names the destination
    return y_RD.detach(), grad_of(x_RD), counter


def send_rows_mutated(rank: int, matrix: list[list[int]], mutation: str) -> tuple[Tensor, Tensor, TrafficCounter]:
    right = collectives._start_exchange

    def wrong(
        x_RD: Tensor, send: list[int], recv: list[int], group: dist.ProcessGroup
    ) -> tuple[Tensor, dist.Work | None]:
        if mutation == "nothing travels":
            return x_RD.clone(), None
        y_RD, work = right(x_RD.flip(0) if mutation == "destinations swapped" else x_RD, send, recv, group)
        assert work is not None
        work.wait()
        return y_RD.flip(0) if mutation == "sources swapped" else y_RD, None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collectives, "_start_exchange", wrong)
        return send_rows(rank, matrix, torch.float64)


def strided_body(rank: int) -> tuple[list[float], list[float]]:
    """Every other column of rows, and a gradient that is one number seen from everywhere."""
    world = dist.get_world_size()
    x_RD = torch.arange(2.0 * 4 * world).view(2 * world, 4)[:, ::2].requires_grad_()
    x_RD.retain_grad()
    y_RD = all_to_all_rows(x_RD, [2] * world, [2] * world, world_group())
    y_RD.sum().backward()
    assert x_RD.grad is not None
    return y_RD.flatten().tolist(), x_RD.grad.flatten().tolist()


def test_rows_and_gradients_of_any_stride_travel() -> None:
    for rank, (rows, grad) in enumerate(run_on_ranks(2, strided_body)):
        mine = [8.0 * rank + 4 * row + column for row in range(2) for column in (0, 2)]
        assert rows == mine * 2
        assert grad == [1.0] * 8


def expected_rows(rank: int, matrix: list[list[int]]) -> list[float]:
    return [row_value(s, rank, row) for s in range(len(matrix)) for row in range(matrix[s][rank])]


def check_rows(results: list[tuple[Tensor, Tensor, TrafficCounter]], matrix: list[list[int]]) -> None:
    for rank, (received, grad, counter) in enumerate(results):
        assert received.tolist() == [[value] * 3 for value in expected_rows(rank, matrix)]
        assert grad.tolist() == [[dest + 1.0] * 3 for dest, count in enumerate(matrix[rank]) for _ in range(count)]
        away = sum(matrix[rank]) - matrix[rank][rank]
        home = sum(row[rank] for row in matrix) - matrix[rank][rank]
        if len(matrix) > 1:
            assert counter.rows == {"combine": away, "combine_grad": home}
            assert counter.bytes == {"combine": away * 24, "combine_grad": home * 24}


@pytest.mark.parametrize("kind", ["uneven", "nothing", "all to last", "first silent"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_rows_arrive_in_source_order_and_gradients_return(kind: str, world_size: int) -> None:
    matrix = counts_matrix(kind, world_size)
    check_rows(run_on_ranks(world_size, send_rows, matrix, torch.float64), matrix)


@pytest.mark.parametrize("mutation", ["sources swapped", "destinations swapped", "nothing travels"])
def test_the_checks_notice_rows_at_the_wrong_rank(mutation: str) -> None:
    matrix = [[1, 2], [2, 1]]
    with pytest.raises(AssertionError):
        check_rows(run_on_ranks(2, send_rows_mutated, matrix, mutation), matrix)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_keep_their_type(dtype: torch.dtype) -> None:
    matrix = counts_matrix("uneven", 2)
    for rank, (received, grad, _) in enumerate(run_on_ranks(2, send_rows, matrix, dtype)):
        assert received.dtype == grad.dtype == dtype
        assert received[:, 0].tolist() == expected_rows(rank, matrix)


def swap_counts(rank: int) -> tuple[Tensor, Tensor, list[int]]:
    world_size = dist.get_world_size()
    counts_WC = torch.tensor([[100 * rank + 10 * dest + c for c in range(2)] for dest in range(world_size)])
    kept = counts_WC.clone()
    received = exchange_counts(counts_WC, world_group())
    assert torch.equal(counts_WC, kept)
    return received, exchange_counts(counts_WC.T.contiguous().T, world_group()), [received.dtype == torch.int64]


@pytest.mark.parametrize("world_size", [1, 3])
def test_counts_are_transposed_between_ranks(world_size: int) -> None:
    for rank, (received, from_strided, is_int64) in enumerate(run_on_ranks(world_size, swap_counts)):
        expected = [[100 * source + 10 * rank + c for c in range(2)] for source in range(world_size)]
        assert received.tolist() == expected
        assert from_strided.tolist() == expected
        assert is_int64 == [True]


def sum_of_all(rank: int) -> tuple[list[float], list[float]]:
    x = torch.tensor([1.0, 10.0], requires_grad=True) * 10**rank
    total = all_reduce_sum(x, world_group())
    assert not total.requires_grad
    return x.tolist(), total.tolist()


@pytest.mark.parametrize("world_size", [1, 3])
def test_sums_are_new_tensors(world_size: int) -> None:
    total = sum(10**rank for rank in range(world_size))
    for rank, (kept, summed) in enumerate(run_on_ranks(world_size, sum_of_all)):
        assert kept == [10.0**rank, 10.0 ** (rank + 1)]
        assert summed == [total, 10 * total]


def wrong_counts(rank: int, send: list[int], recv: list[int]) -> None:
    all_to_all_rows(torch.zeros(3, 2), send, recv, world_group())


@pytest.mark.parametrize(
    ("send", "recv", "text"),
    [
        ([1, 1], [1, 1], r"send_counts sum to 2 but there are 3 rows; count every row once"),
        ([3], [3], r"must have one entry per rank of the group \(2\)"),
        ([4, -1], [1, 1], r"counts must be at least 0, got \[4, -1\]"),
    ],
)
def test_counts_that_do_not_fit_are_refused(send: list[int], recv: list[int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        run_on_ranks(2, wrong_counts, send, recv)


def wrong_tables(rank: int) -> None:
    exchange_counts(torch.zeros(3, 1, dtype=torch.int64), world_group())


def test_a_table_without_a_row_per_rank_is_refused() -> None:
    with pytest.raises(ValueError, match=r"counts must be \[W, C\] with W = 2 ranks, got \[3, 1\]"):
        run_on_ranks(2, wrong_tables)
    with pytest.raises(ValueError, match="a group of one sends 3 rows to itself but expects 2"):
        run_on_ranks(1, wrong_counts, [3], [2])


def needed_body(rank: int) -> dict[str, list[int]]:
    """Rows that this rank sends in the backward pass, by what is differentiated: what lies before or behind."""
    world, group = dist.get_world_size(), world_group()
    first_DD, second_DD = (torch.ones(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x_RD = torch.arange(3.0 * world, dtype=torch.float64).view(world, 3).requires_grad_()
    found = {}
    for name, wanted in (("behind", [second_DD]), ("before", [first_DD]), ("tokens", [x_RD]), ("frozen", [second_DD])):
        counter = TrafficCounter()
        rows_RD = (x_RD.detach() @ first_DD.detach()) if name == "frozen" else x_RD @ first_DD
        even = [1] * world
        moved_RD = all_to_all_rows(rows_RD, even, even, group, counter=counter)
        gathered_RD = gather_rows_of_all(moved_RD, [world] * world, group, counter=counter)
        summed_RD = sum_rows_of_all(gathered_RD, [world] * world, group, counter=counter)
        torch.autograd.grad((summed_RD @ second_DD).sum(), wanted)
        found[name] = [counter.rows.get(f"{what}_grad", 0) for what in ("dispatch", "etp_gather", "etp_sum")]
    return found


def test_backward_sends_nothing_that_nobody_asked_for() -> None:
    """Frozen layers, and the phases of a split backward pass: who needs no gradient of its rows sends none."""
    for found in run_on_ranks(2, needed_body):
        assert found["behind"] == found["frozen"] == [0, 0, 0]
        assert found["before"] == found["tokens"] == [1, 2, 2]
