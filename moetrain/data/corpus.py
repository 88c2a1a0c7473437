"""Real text that is on any machine already, so that the quick start downloads nothing."""

import sysconfig
from pathlib import Path

from moetrain.data.sources import Source

_CAP_BYTES = 12 * 2**20  # per domain: a few tens of megabytes altogether


def quickstart_sources(root: Path = Path("/usr"), *, cap_bytes: int = _CAP_BYTES) -> list[Source]:
    """Sources of those domains that exist here: Python (always), manual pages, C headers, licences."""
    candidates = [
        Source(
            name="python",
            path=Path(sysconfig.get_paths()["stdlib"]),
            patterns=("*.py",),
            exclude=("site-packages", "dist-packages", "test", "tests", "__pycache__"),
            max_bytes=cap_bytes,
            skip_unreadable=True,
        ),
        Source(
            name="man",
            path=root / "share/man",
            patterns=tuple(f"man{section}/*" for section in range(1, 9)),
            max_bytes=cap_bytes,
            skip_unreadable=True,
        ),
        Source(
            name="headers",
            path=root / "include",
            patterns=("*.h", "*.hpp"),
            max_bytes=cap_bytes,
            skip_unreadable=True,
        ),
        Source(name="licences", path=root / "share/common-licenses", max_bytes=cap_bytes, skip_unreadable=True),
    ]
    return [source for source in candidates if source.path.is_dir() and source.files()]
