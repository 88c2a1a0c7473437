import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from safetensors import SafetensorError
from torch import Tensor

from moetrain.checkpoint import (
    CorruptCheckpointError,
    UnsavedCheckpointError,
    list_checkpoints,
    prune,
    step_path,
)
from moetrain.checkpoint import manifest as manifest_module
from moetrain.checkpoint import storage as storage_module
from moetrain.checkpoint.folder import find_latest, find_verified, verify
from moetrain.checkpoint.manifest import Manifest
from moetrain.checkpoint.names import MANIFEST
from moetrain.checkpoint.save_load import load, save
from moetrain.checkpoint.shards import LogicalTensor, TensorShard

FULL = torch.arange(40, dtype=torch.float32).reshape(8, 5)
FLAT = torch.arange(17, dtype=torch.int64) * 3


def write(folder: Path, step: int = 3) -> Path:
    state = {"a": LogicalTensor.whole(FULL + step), "b": LogicalTensor.whole(FLAT)}
    return save(folder, step, state, {"note": "hello"})


def data_file(path: Path) -> Path:
    return next(path.glob("*.safetensors"))


def cut(full: Tensor, rank: int, size: int) -> LogicalTensor:
    """Rows rank, rank + size, ... of a 2-D tensor, as one shard each; or a contiguous share of a flat one."""
    if full.dim() == 2:
        return LogicalTensor(
            tuple(full.shape), tuple(TensorShard((row, 0), full[row : row + 1].clone()) for row in range(rank, 8, size))
        )
    length = -(-full.numel() // size)
    part = full[rank * length : (rank + 1) * length].clone()
    return LogicalTensor(tuple(full.shape), (TensorShard((min(rank * length, full.numel()),), part),))


def save_body(rank: int, folder: Path) -> None:
    size = dist.get_world_size()
    state = {"a": cut(FULL, rank, size), "b": cut(FLAT, rank, size)}
    if rank == 0:
        state["only-first"] = LogicalTensor.whole(torch.tensor([1.5, -2.0], dtype=torch.float64))
    save(folder, 7, state, {"from": size}, group=dist.group.WORLD)


def load_body(rank: int, folder: Path) -> bool:
    size = dist.get_world_size()
    wanted = {"a": cut(FULL, rank, size), "b": cut(FLAT, rank, size)}
    for logical in wanted.values():
        for shard in logical.shards:
            shard.tensor.zero_()
    path = find_latest(folder, dist.group.WORLD)
    assert path is not None
    manifest = load(path, wanted, group=dist.group.WORLD)
    assert (manifest.step, manifest.extra) == (7, {"from": 2})
    return all(
        torch.equal(shard.tensor, right.tensor)
        for key, full in (("a", FULL), ("b", FLAT))
        for shard, right in zip(wanted[key].shards, cut(full, rank, size).shards, strict=True)
    )


def corrupt_body(rank: int, folder: Path) -> str:
    with pytest.raises(CorruptCheckpointError) as caught:
        verify(step_path(folder, 7), dist.group.WORLD)
    return str(caught.value)


def test_one_process_round_trip(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert path == tmp_path / "step-00000003"
    wanted = {"a": LogicalTensor.whole(torch.zeros(8, 5)), "b": LogicalTensor.whole(torch.zeros(17, dtype=torch.int64))}
    manifest = load(path, wanted)
    assert manifest.step == 3
    assert manifest.extra == {"note": "hello"}
    assert torch.equal(wanted["a"].shards[0].tensor, FULL + 3)
    assert torch.equal(wanted["b"].shards[0].tensor, FLAT)


def test_nothing_but_json_and_safetensors_is_written(tmp_path: Path) -> None:
    path = write(tmp_path)
    assert sorted(file.name for file in path.iterdir()) == ["data-00000.safetensors", MANIFEST]
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    json.loads((path / MANIFEST).read_text())


@pytest.mark.dist
def test_saved_on_two_ranks_loads_on_one_and_four(tmp_path: Path) -> None:
    run_on_ranks(2, save_body, tmp_path)
    path = step_path(tmp_path, 7)
    assert len(list(path.glob("data-*.safetensors"))) == 2
    whole = {"a": LogicalTensor.whole(torch.zeros(8, 5)), "only-first": LogicalTensor.whole(torch.zeros(2).double())}
    load(path, whole)
    assert torch.equal(whole["a"].shards[0].tensor, FULL)
    assert whole["only-first"].shards[0].tensor.tolist() == [1.5, -2.0]
    assert run_on_ranks(4, load_body, tmp_path) == [True] * 4


@pytest.mark.dist
def test_all_ranks_see_the_damage_that_one_finds(tmp_path: Path) -> None:
    run_on_ranks(2, save_body, tmp_path)
    victim = step_path(tmp_path, 7) / "data-00001.safetensors"
    flip(victim)
    messages = run_on_ranks(2, corrupt_body, tmp_path)
    assert messages[0] == messages[1]
    assert "data-00001.safetensors does not match its checksum" in messages[0]


def flip(path: Path, position: int = -3) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def damage_bit(path: Path) -> None:
    flip(data_file(path))


def damage_truncate(path: Path) -> None:
    data_file(path).write_bytes(data_file(path).read_bytes()[:-8])


def damage_remove(path: Path) -> None:
    data_file(path).unlink()


def damage_metadata(path: Path) -> None:
    text = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(text.replace('"hello"', '"hullo"'))


def damage_json(path: Path) -> None:
    (path / MANIFEST).write_text((path / MANIFEST).read_text()[:-20])


def damage_no_metadata(path: Path) -> None:
    (path / MANIFEST).unlink()


DAMAGES = [
    (damage_bit, "data-00000.safetensors does not match its checksum"),
    (damage_truncate, r"data-00000.safetensors has \d+ bytes instead of \d+"),
    (damage_remove, "data-00000.safetensors is missing"),
    (damage_metadata, "metadata.json does not match its checksum"),
    (damage_json, "metadata.json cannot be read"),
    (damage_no_metadata, "metadata.json is missing"),
]


@pytest.mark.parametrize(("damage", "text"), DAMAGES)
def test_damage_is_found_and_the_older_checkpoint_is_used(
    damage: Callable[[Path], None], text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = write(tmp_path, 3), write(tmp_path, 6)
    assert find_latest(tmp_path) == newer
    damage(newer)
    with pytest.raises(CorruptCheckpointError, match=text):
        load(newer, {"a": LogicalTensor.whole(torch.zeros(8, 5))})
    with caplog.at_level(logging.WARNING):
        assert find_latest(tmp_path) == older
    assert "step-00000006 is damaged" in caplog.text
    assert "trying the one before it" in caplog.text


def test_every_single_flipped_bit_of_the_metadata_is_found(tmp_path: Path) -> None:
    path = write(tmp_path)
    clean = (path / MANIFEST).read_bytes()
    missed = []
    for position in range(0, len(clean), 7):
        flip(path / MANIFEST, position)
        try:
            same = verify(path)
        except CorruptCheckpointError:
            continue
        finally:
            (path / MANIFEST).write_bytes(clean)
        missed.append((position, same))
    # White space and the letter case of escapes mean nothing in JSON; whatever was read back was unchanged.
    assert all(manifest == verify(path) for _, manifest in missed)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert find_latest(tmp_path / "nowhere") is None
    assert find_latest(tmp_path) is None


def test_an_unfinished_draft_is_not_a_checkpoint(tmp_path: Path) -> None:
    path = write(tmp_path, 3)
    path.rename(tmp_path / ".draft-step-00000009")
    assert list_checkpoints(tmp_path) == []
    again = write(tmp_path, 9)
    assert find_latest(tmp_path) == again
    assert not (tmp_path / ".draft-step-00000009").exists()


def test_saving_again_replaces_a_damaged_checkpoint(tmp_path: Path) -> None:
    damage_bit(write(tmp_path, 4))
    assert find_latest(tmp_path) is None
    write(tmp_path, 4)
    assert find_latest(tmp_path) == step_path(tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_only_the_newest_stay(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        write(tmp_path, step)
    prune(tmp_path, 0, step=10)
    assert len(list_checkpoints(tmp_path)) == 3
    prune(tmp_path, 2, step=10)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000010"]


def test_the_fields_of_a_name_grow_with_the_step(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        write(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-99999999", "step-100000000"]
    assert find_latest(tmp_path) == step_path(tmp_path, 100_000_000)


def test_what_was_just_written_stays_beside_damaged_later_ones(tmp_path: Path) -> None:
    """As after the run went on from before them: what it saves next has lower numbers."""
    tensor = {"a": LogicalTensor.whole(FULL)}
    for step in (900, 1000):
        damage_bit(write(tmp_path, step))
    for step in (100, 200, 300):
        written = save(tmp_path, step, tensor, {}, keep=2)
        assert find_latest(tmp_path) == written
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"step-{step:08d}" for step in (200, 300, 900, 1000)]
    save(tmp_path, 900, tensor, {}, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000900", "step-00001000"]


def test_damaged_checkpoints_that_stay_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    older = write(tmp_path, 3)
    assert find_latest(tmp_path) == older
    assert "damaged" not in caplog.text
    for step in (6, 9):
        damage_bit(write(tmp_path, step))
    assert find_latest(tmp_path) == older
    assert caplog.text.count(f"2 damaged checkpoint(s) stay in {tmp_path} until the run saves their steps anew") == 1


def test_what_was_found_is_neither_hashed_nor_parsed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    calls: list[str] = []
    hashed, parsed = manifest_module.file_digest, Manifest.read

    def noting_hash(path: Path) -> str:
        calls.append(path.name)
        return hashed(path)

    def noting_read(path: Path) -> Manifest:
        calls.append(MANIFEST)
        return parsed(path)

    monkeypatch.setattr(manifest_module, "file_digest", noting_hash)
    monkeypatch.setattr(Manifest, "read", staticmethod(noting_read))
    found = find_verified(tmp_path)
    assert found is not None
    path, manifest = found
    wanted = {"a": LogicalTensor.whole(torch.zeros(8, 5))}
    assert load(path, wanted, manifest=manifest) == manifest
    assert torch.equal(wanted["a"].shards[0].tensor, FULL + 3)
    assert calls == [MANIFEST, "data-00000.safetensors"]
    load(path, wanted)  # on its own it verifies, and parses once
    assert calls == [MANIFEST, "data-00000.safetensors"] * 2


def test_pieces_must_tile_the_tensor_once(tmp_path: Path) -> None:
    half = LogicalTensor((8, 5), (TensorShard((0, 0), FULL[:4]),))
    with pytest.raises(ValueError, match="shards of a must tile its 40 elements once, but they have 20"):
        save(tmp_path, 1, {"a": half}, {})
    assert list_checkpoints(tmp_path) == []


def test_a_failing_disk_is_an_ordinary_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UnsavedCheckpointError, match=r"step-00000003 could not be saved: rank 0: .*Not a directory"):
        write(tmp_path / "file")


def fill_the_disk(tensors: dict[str, Tensor], path: Path) -> None:
    """As ``save_file`` does: what fits is written."""
    path.write_bytes(b"half")
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def full_disk_body(rank: int, folder: Path) -> str:
    """One rank's disk is full; all are told, and none waits for another."""
    save_body(rank, folder)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr(storage_module, "save_file", fill_the_disk)
        with pytest.raises(UnsavedCheckpointError) as caught:
            save(folder, 8, {f"t{rank}": LogicalTensor.whole(FULL)}, {}, group=dist.group.WORLD)
    found = find_latest(folder, dist.group.WORLD)
    assert found == step_path(folder, 7)
    return str(caught.value)


@pytest.mark.dist
def test_a_full_disk_is_told_with_a_cure_and_costs_nothing_older(tmp_path: Path) -> None:
    messages = run_on_ranks(2, full_disk_body, tmp_path)
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"checkpoint {step_path(tmp_path, 8)} could not be saved: rank 1: ")
    assert "No space left on device" in messages[0]
    assert "free space" in messages[0]
    assert "start again: what was saved before is whole" in messages[0]


def test_a_tensor_with_a_hole_is_refused_with_a_cure(tmp_path: Path) -> None:
    """Checksums cannot tell: the manifest itself lacks the box."""
    path = write(tmp_path)
    manifest = Manifest.read(path)
    whole = manifest.tensors["a"]
    chunk = replace(whole.chunks[0], shape=(4, 5))
    replace(manifest, tensors={"a": replace(whole, chunks=(chunk,))}).write(path)
    with pytest.raises(ValueError, match=r"a is not complete in the checkpoint; remove it to go on from an older one"):
        load(path, {"a": LogicalTensor.whole(torch.zeros(8, 5))})


def test_a_piece_must_lie_inside_its_tensor() -> None:
    with pytest.raises(ValueError, match=r"a shard must lie inside \[8, 5\], got one at \[5, 0\] of \[4, 5\]"):
        LogicalTensor((8, 5), (TensorShard((5, 0), FULL[:4]),))


def test_another_models_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(ValueError, match="it must hold c, but does not; it is of another model"):
        load(path, {"c": LogicalTensor.whole(torch.zeros(2))})
    with pytest.raises(ValueError, match=r"a must be \[8, 6\], the checkpoint has \[8, 5\]"):
        load(path, {"a": LogicalTensor.whole(torch.zeros(8, 6))})


def test_bfloat16_and_scalars_survive(tmp_path: Path) -> None:
    narrow, scalar = torch.tensor([1.5, -3.0], dtype=torch.bfloat16), torch.tensor(2.25)
    path = save(tmp_path, 1, {"n": LogicalTensor.whole(narrow), "s": LogicalTensor.whole(scalar)}, {})
    got = {"n": LogicalTensor.whole(torch.zeros_like(narrow)), "s": LogicalTensor.whole(torch.zeros(()))}
    load(path, got)
    assert torch.equal(got["n"].shards[0].tensor, narrow)
    assert got["s"].shards[0].tensor.item() == 2.25
