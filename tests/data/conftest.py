from pathlib import Path

import pytest

from moetrain.data.sources import Source


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    for name, size in (("odd", 40), ("even", 21)):
        folder = tmp_path / name
        folder.mkdir()
        for i in range(size):
            (folder / f"{i:02}.txt").write_bytes(f"{name} {i} ".encode() * (i + 1) + b"\xff\x00")
    (tmp_path / "odd/empty.txt").write_bytes(b"")
    (tmp_path / "odd/one.txt").write_bytes(b"x")
    (tmp_path / "even/twin.txt").write_bytes((tmp_path / "odd/07.txt").read_bytes())
    return [Source(name="odd", path=tmp_path / "odd"), Source(name="even", path=tmp_path / "even")]
