"""Gathering and scattering tokens over a tp group, rows over an etp group: small integers, equal to the bit."""

import pytest
import torch
from known import grad_of, sum_of
from ranks import run_on_ranks

from moetrain.mesh.collectives import gather_rows_of_all, sum_rows_of_all
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.mesh.groups import MeshGroups
from moetrain.mesh.tensor_parallel import Cut, TensorParallel, uncut
from moetrain.mesh.traffic import TrafficCounter

pytestmark = pytest.mark.dist


def whole(num_tokens: int, seed: int = 0) -> torch.Tensor:
    return ((torch.arange(num_tokens * 3) * 7 + 5 * seed) % 11 - 5).double().view(num_tokens, 3)


def tokens_body(rank: int, world: int, num_tokens: int) -> None:
    groups = MeshGroups.create(FoldedMesh(tp=world, edp=world))
    counter = TrafficCounter()
    tp = TensorParallel(groups.group("tp"), groups.group_rank("tp"), counter)
    full_TD = whole(num_tokens)
    mine_tD = tp.local(full_TD, padding=0).requires_grad_()
    assert mine_tD.shape[0] == tp.num_local(num_tokens) == -(-num_tokens // world)

    gathered_TD = tp.gather(mine_tD, num_tokens)
    assert torch.equal(gathered_TD, full_TD)
    (gathered_TD * whole(num_tokens, rank + 1)).sum().backward()
    summed_TD = sum_of(whole(num_tokens, other + 1) for other in range(world))
    assert torch.equal(grad_of(mine_tD), tp.local(summed_TD, padding=0))

    partial_TD = whole(num_tokens, rank + 1).requires_grad_()
    scattered_tD = tp.scatter_sum(partial_TD)
    assert torch.equal(scattered_tD, tp.local(summed_TD, padding=0))
    (scattered_tD * mine_tD.detach()).sum().backward()
    assert torch.equal(grad_of(partial_TD), full_TD)

    rows = (world - 1) * tp.num_local(num_tokens)
    assert set(counter.rows.values()) <= {rows}
    assert counter.bytes.get("tp_gather", 0) == rows * 3 * 8
    with pytest.raises(ValueError, match=r"tokens over .* ranks are .* on each, got"):
        tp.gather(whole(tp.num_local(num_tokens) + 1), num_tokens)
    cut = tp.cut(0, num_tokens)
    assert torch.equal(tp.whole(full_TD[cut.start : cut.start + cut.size], cut), full_TD)
    groups.close()


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", [0, 1, 5, 6])
def test_tokens_are_gathered_and_sums_scattered(world: int, num_tokens: int) -> None:
    run_on_ranks(world, tokens_body, world, num_tokens)


def rows_body(rank: int, world: int, counts: list[int], dtype: torch.dtype) -> None:
    groups = MeshGroups.create(FoldedMesh(dp_shard=world, etp=world))
    group, counter = groups.group("etp"), TrafficCounter()
    everything = whole(sum(counts)).to(dtype)
    x_RD = everything.split(counts)[rank].clone().requires_grad_()
    gathered_RD = gather_rows_of_all(x_RD, counts, group, counter=counter)
    assert torch.equal(gathered_RD, everything)
    (gathered_RD * whole(sum(counts), rank + 1).to(dtype)).sum().backward()
    summed = sum_of(whole(sum(counts), other + 1) for other in range(world)).to(dtype)
    assert torch.equal(grad_of(x_RD), summed.split(counts)[rank])

    partial_RD = whole(sum(counts), rank + 1).to(dtype).requires_grad_()
    mine_RD = sum_rows_of_all(partial_RD, counts, group, counter=counter)
    assert mine_RD.dtype == dtype
    assert torch.equal(mine_RD, summed.split(counts)[rank])
    (mine_RD * everything.split(counts)[rank]).sum().backward()
    assert torch.equal(grad_of(partial_RD), everything)
    if world > 1:
        assert counter.rows["etp_gather"] == (world - 1) * counts[rank] == counter.rows["etp_sum_grad"]
        assert counter.rows["etp_sum"] == sum(counts) - counts[rank] == counter.rows["etp_gather_grad"]
        with pytest.raises(ValueError, match=r"gather_rows_of_all: counts \[.*\] announce \d+ rows of rank"):
            gather_rows_of_all(x_RD.new_zeros(counts[rank] + 1, 3), counts, group)
        with pytest.raises(ValueError, match="one entry of at least 0 per rank"):
            sum_rows_of_all(partial_RD, counts[1:], group)
    groups.close()


@pytest.mark.parametrize("counts", [[4], [2, 3], [0, 2], [0, 0], [1, 0, 3]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_of_all_parts_meet_and_their_sums_part(counts: list[int], dtype: torch.dtype) -> None:
    run_on_ranks(len(counts), rows_body, len(counts), counts, dtype)


def test_cuts_share_everything() -> None:
    for world in (1, 2, 3, 5):
        for total in (0, 1, 5, 24):
            parts = [_place(world, rank).cut(1, total) for rank in range(world)]
            assert sum(part.size for part in parts) == total
            assert [part.start for part in parts] == [sum(p.size for p in parts[:i]) for i in range(world)]
            assert max(part.size for part in parts) - min(part.size for part in parts) <= 1
    assert uncut((4, 6), (2, 0), None) == ((4, 6), (2, 0))
    assert uncut((4, 6), (2, 1), Cut(1, 6, 6, 18)) == ((4, 18), (2, 7))


def _place(world: int, rank: int) -> TensorParallel:
    class Group:
        def size(self) -> int:
            return world

    return TensorParallel(Group(), rank)  # type: ignore[arg-type]
