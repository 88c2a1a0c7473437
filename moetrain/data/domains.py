"""The domains of a dataset that a run takes: what share each has, and their streams."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moetrain.config.errors import nearest, require, require_one_of
from moetrain.data.entropy import ContextCounts, Entropies
from moetrain.data.indexed import IndexedReader
from moetrain.data.manifest import SPLITS, Manifest
from moetrain.data.stream import TokenStream
from moetrain.data.tokenizer import ByteTokenizer

Split = Literal["train", "validation"]


@dataclass(frozen=True, slots=True, eq=False)
class Domains:
    """Domains by name, ascending, what each weighs, and the stream of each."""

    manifest: Manifest
    tokenizer: ByteTokenizer
    split: Split
    weights: dict[str, float]
    streams: Sequence[TokenStream]

    @classmethod
    def open(cls, path: Path, split: Split, seed: int, weights: Mapping[str, float] | None) -> "Domains":
        """Open the files.

        Args:
            path: a folder that ``prepare`` wrote.
            split: ``train`` or ``validation``.
            seed: of the order of training documents.
            weights: shares of training data by domain; a domain that is not named gets none. Empty: in proportion to
                tokens. Validation takes the same domains, in proportion to their tokens.
        """
        require_one_of("split", split, SPLITS)
        manifest = Manifest.read(path)
        tokenizer = manifest.make_tokenizer()
        shares = _shares(manifest, split, dict(weights or {}), path)
        order_seed = seed if split == "train" else None
        streams = [
            TokenStream(IndexedReader(Path(path) / f"{name}.{split}"), name, order_seed, tokenizer.vocab_size)
            for name in shares
        ]
        return cls(manifest, tokenizer, split, shares, streams)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the domains."""
        return tuple(self.weights)

    def entropies(self) -> Entropies:
        """What a model must beat on this validation set: entropies of the bytes of its own domains, and of no other.

        The manifest states those of each domain and of all together; those of several out of more are counted anew.
        """
        require_one_of("split", self.split, ("validation",))
        known = self.manifest.domains
        if all(name in self.names for name, domain in known.items() if domain.validation.bytes):
            return self.manifest.entropies
        if len(self.names) == 1:
            return known[self.names[0]].entropies
        counts = ContextCounts()
        for stream in self.streams:
            for document in stream.documents():
                counts.add(self.tokenizer.decode_bytes(document))
        return counts.entropies()


def _shares(manifest: Manifest, split: Split, given: dict[str, float], path: Path) -> dict[str, float]:
    known = manifest.domains
    for name in given:
        near = nearest(name, known)
        require(
            name in known,
            f"data.domain_weights names {name!r}, but {path} has {', '.join(known)}; "
            + (f"did you mean {near!r}?" if near else "name one of these"),
        )
    used = [name for name in sorted(known) if not given or given.get(name, 0.0) > 0]
    tokens = {name: known[name].split(split).tokens for name in used}
    if split == "train" and given:
        return {name: given[name] for name in used}
    return {name: float(n) for name, n in tokens.items() if n > 1}  # one token has no target
