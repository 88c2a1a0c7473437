"""``manifest.json``: what a prepared dataset holds. It is written last, so where it exists the dataset is whole."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from moetrain.config.errors import require
from moetrain.data.entropy import Entropies
from moetrain.data.tokenizer import ByteTokenizer, tokenizer_named

MANIFEST = "manifest.json"
FORMAT = "moetrain-dataset"
VERSION = 1
SPLITS = ("train", "validation")


@dataclass(frozen=True, slots=True)
class FileInfo:
    """Size and SHA-256 of one file of the dataset."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileInfo":
        """Read the file and measure it."""
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return cls(path.stat().st_size, digest.hexdigest())


@dataclass(frozen=True, slots=True)
class SplitInfo:
    """One split of one domain: documents, tokens (each document ends in EOD), bytes of text, files."""

    documents: int
    tokens: int
    bytes: int
    files: Mapping[str, FileInfo]


@dataclass(frozen=True, slots=True)
class DomainInfo:
    """One domain, and how many of its files were left out because they were empty, repeated or unreadable."""

    train: SplitInfo
    validation: SplitInfo
    entropies: Entropies  # of the validation bytes
    empty: int
    duplicates: int
    unreadable: int

    def split(self, name: str) -> SplitInfo:
        """``train`` or ``validation``."""
        return self.train if name == "train" else self.validation


@dataclass(frozen=True, slots=True)
class Manifest:
    """A prepared dataset. ``fingerprint`` identifies sources and options, ``entropies`` all validation bytes."""

    tokenizer: str
    vocab_size: int
    domains: Mapping[str, DomainInfo]
    entropies: Entropies
    options: Mapping[str, Any]
    fingerprint: str
    format: str = FORMAT
    version: int = VERSION

    def make_tokenizer(self) -> ByteTokenizer:
        """The tokenizer that wrote the dataset."""
        return tokenizer_named(self.tokenizer)

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` into ``folder``."""
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=2, sort_keys=True) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read ``manifest.json`` and check that the files it names have their sizes.

        Raises:
            ValueError: where the manifest or a file is missing, damaged or of another version.
        """
        path = Path(folder) / MANIFEST
        require(
            path.is_file(),
            f"no prepared dataset at {folder}: {path} is missing; "
            f"run `moetrain prep --quickstart --out {folder}`, or --source name=path for text of your own",
        )
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} is damaged ({type(error).__name__}: {error}); prepare the dataset again"
            ) from error
        try:
            raw = _typed(dict[str, Any], raw, "")
            _check_version(raw, path)
            manifest = _typed(cls, raw, "")
        except TypeError as error:
            raise ValueError(f"{path} is damaged: {error}; prepare the dataset again") from error
        assert isinstance(manifest, cls)
        manifest._check_sizes(Path(folder))
        return manifest

    def verify(self, folder: Path) -> None:
        """Read every file and compare its SHA-256; raise ``ValueError`` naming the first that differs."""
        for name, info in self._files():
            found = FileInfo.of(folder / name)
            require(
                found == info,
                f"{folder / name} is damaged: SHA-256 {found.sha256} of {found.bytes} bytes, the manifest says "
                f"{info.sha256} of {info.bytes}; prepare the dataset again",
            )

    def _check_sizes(self, folder: Path) -> None:
        for name, info in self._files():
            path = folder / name
            require(path.is_file(), f"{path} is missing, though {MANIFEST} names it; prepare the dataset again")
            size = path.stat().st_size
            require(
                size == info.bytes,
                f"{path} has {size} bytes, {MANIFEST} says {info.bytes}: it is truncated or changed; "
                "prepare the dataset again",
            )

    def _files(self) -> list[tuple[str, FileInfo]]:
        return [pair for domain in self.domains.values() for s in SPLITS for pair in domain.split(s).files.items()]


def data_facts(manifest: Manifest) -> dict[str, Any]:
    """What a dataset holds, by name and as JSON; equal for copies of it, wherever and whenever they were made."""
    files = {
        f"file {name}": info.sha256
        for domain in manifest.domains.values()
        for split in SPLITS
        for name, info in domain.split(split).files.items()
    }
    return {"tokenizer": manifest.tokenizer, "vocab_size": manifest.vocab_size, **files}


def _check_version(raw: Mapping[str, Any], path: Path) -> None:
    found, version = raw.get("format"), raw.get("version")
    require(found == FORMAT, f"{path} must have format {FORMAT!r}, got {found!r}; name another folder")
    require(
        version == VERSION, f"{path} has version {version}, this moetrain reads {VERSION}; prepare the dataset again"
    )


def _typed(kind: Any, value: Any, name: str) -> Any:
    """JSON's ``value`` as ``kind``: a dataclass, a mapping with texts for keys, a text, or a number of at least 0.

    Raises:
        TypeError: naming the field; its name is ``name``, in dots.
    """
    if kind is Any:
        return value
    if isinstance(kind, type) and is_dataclass(kind):
        values = _typed(dict[str, Any], value, name)
        kinds = get_type_hints(kind)
        lacking = [field.name for field in fields(kind) if field.default is MISSING and field.name not in values]
        surplus = [key for key in values if key not in kinds]
        if lacking or surplus:
            what, which = ("lacks", lacking) if lacking else ("has no field called", surplus)
            raise TypeError(f"{name or 'it'} {what} {', '.join(which)}")
        return kind(**{key: _typed(kinds[key], item, _inside(name, key)) for key, item in values.items()})
    if get_origin(kind) in (dict, Mapping):
        if not isinstance(value, dict):
            raise TypeError(f"{name or 'it'} must be an object, got {repr(value)[:80]} ({type(value).__name__})")
        return {key: _typed(get_args(kind)[1], item, _inside(name, key)) for key, item in value.items()}
    is_number = kind in (int, float) and isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not (is_number and 0 <= value < 2**63 if kind in (int, float) else isinstance(value, kind)):  # NaN neither
        what = "text" if kind is str else f"{kind.__name__} from 0 to 2^63"
        raise TypeError(f"{name} must be {what}, got {repr(value)[:80]} ({type(value).__name__})")
    return value


def _inside(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
