"""Documents of a prepared dataset as sequences of their own. Shapes: N sequences.

A document of n tokens, its EOD included, has n - 1 inputs, each with the next token as its target; one that has none is
left out. A document longer than the context is cut into parts, each of which is a sequence with positions of its own.

A sequence's id says where it is: domain << 53 | document << 21 | part, documents being counted on from epoch to epoch.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moetrain.config.errors import require, require_at_least
from moetrain.data.domains import Domains, Split
from moetrain.data.entropy import Entropies
from moetrain.data.mixing import PERIOD, apportion
from moetrain.data.stream import shuffled

Ints = NDArray[np.int64]

_PART_BITS, _DOCUMENT_BITS, _DOMAIN_BITS = 21, 32, 10


class DocumentDataset:
    """Documents by where they begin, the same whatever the ranks and the size of a step.

    Training is endless: each domain is a stream of its documents, shuffled anew in each epoch by (seed, domain, epoch).
    Of the places [a, b) of the whole, a domain of share w has the documents whose first token lies in [aw, bw) of its
    stream. So steps that follow one another take each document once, and none keeps a position. Validation holds every
    document once, in an order that no seed changes; there a place is a sequence.
    """

    def __init__(
        self,
        path: Path,
        split: Split,
        context: int,
        seed: int = 0,
        domain_weights: Mapping[str, float] | None = None,
    ) -> None:
        """Open the files.

        Args:
            path: a folder that ``prepare`` wrote.
            split: ``train`` or ``validation``.
            context: tokens of the longest sequence.
            seed: of the order of training documents.
            domain_weights: shares of training tokens by domain; see ``Domains.open``.
        """
        require_at_least("context", context, 1)
        self._opened = opened = Domains.open(path, split, seed, domain_weights)
        self.manifest, self.tokenizer, self.split = opened.manifest, opened.tokenizer, opened.split
        self.context = context
        self.domains = opened.names
        require(
            len(self.domains) < 1 << _DOMAIN_BITS,
            f"documents may be of at most {(1 << _DOMAIN_BITS) - 1} domains, got {len(self.domains)}; join some",
        )
        self._streams = opened.streams
        self._shares = apportion(list(opened.weights.values()), PERIOD) if self.domains else []
        self._validation_N3: Ints | None = None if split == "train" else self._whole()

    @property
    def num_rows(self) -> int | None:
        """Sequences of the validation set; None for training, which is endless."""
        return None if self._validation_N3 is None else len(self._validation_N3)

    def expected_documents(self, num_places: int) -> float:
        """Documents that so many places of training have in the mean, over all domains."""
        return sum(
            num_places * share / PERIOD * stream.num_documents(2) / stream.num_tokens
            for share, stream in zip(self._shares, self._streams, strict=True)
        )

    def table(self, first: int, count: int) -> Ints:
        """The sequences of ``count`` places from ``first`` on: int64 [N, 3] of id, tokens and loss tokens.

        Places are tokens of all domains together, each of which may begin a document; in validation, sequences. N may
        be 0, where a long document goes on.
        """
        require_at_least("first", first, 0)
        if self._validation_N3 is not None:
            return self._validation_N3[first : first + count]
        ends = (first, first + count)
        bounds = [[place * share // PERIOD for place in ends] for share in self._shares]
        return np.concatenate([self._between(domain, *of_domain) for domain, of_domain in enumerate(bounds)])

    def num_tokens(self, sequence_id: int) -> int:
        """Inputs of a sequence."""
        domain, document, part = _taken_apart(sequence_id)
        size = self._streams[domain].document_size(document) - 1
        return min(self.context, size - part * self.context)

    def read(self, sequence_id: int, start: int, stop: int) -> tuple[Ints, Ints]:
        """Inputs and targets [start, stop) of a sequence; nothing else is read.

        Raises:
            ValueError: for an id outside the vocabulary.
        """
        domain, document, part = _taken_apart(sequence_id)
        begin = part * self.context
        tokens = self._streams[domain].read_document(document, begin + start, begin + stop + 1)
        return tokens[:-1], tokens[1:]

    def domain_of(self, sequence_id: int) -> str:
        """Name of the domain that a sequence comes from."""
        return self.domains[_taken_apart(sequence_id)[0]]

    def entropies(self) -> Entropies:
        """What a model must beat on this validation set; see ``Domains.entropies``."""
        return self._opened.entropies()

    def _between(self, domain: int, start: int, stop: int) -> Ints:
        number_D, size_D = self._streams[domain].between(start, stop)
        kept_D = size_D > 1
        number_D, inputs_D = number_D[kept_D], size_D[kept_D] - 1
        parts_D = -(-inputs_D // self.context)
        require(
            int(parts_D.max(initial=0)) <= 1 << _PART_BITS and int(number_D.max(initial=0)) < 1 << _DOCUMENT_BITS,
            f"domain {self.domains[domain]}: a document may have {1 << _PART_BITS} parts, and there may be "
            f"{1 << _DOCUMENT_BITS} documents; raise data.context, or train for fewer epochs",
        )
        part_N = np.arange(parts_D.sum()) - np.repeat(np.cumsum(parts_D) - parts_D, parts_D)
        tokens_N = np.minimum(np.repeat(inputs_D, parts_D) - part_N * self.context, self.context)
        id_N = (domain << (_PART_BITS + _DOCUMENT_BITS)) | (np.repeat(number_D, parts_D) << _PART_BITS) | part_N
        return np.stack((id_N, tokens_N, tokens_N), axis=1)

    def _whole(self) -> Ints:
        """Every sequence once, mixed."""
        parts = [self._between(domain, 0, stream.num_tokens) for domain, stream in enumerate(self._streams)]
        table_N3 = np.concatenate([np.empty((0, 3), np.int64), *parts])
        return table_N3[shuffled(len(table_N3), "validation documents")]


def _taken_apart(sequence_id: int) -> tuple[int, int, int]:
    """Domain, number of the document, and part."""
    document = (sequence_id >> _PART_BITS) & ((1 << _DOCUMENT_BITS) - 1)
    return sequence_id >> (_PART_BITS + _DOCUMENT_BITS), document, sequence_id & ((1 << _PART_BITS) - 1)
