import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.data import entropy
from moetrain.data.entropy import ContextCounts, Entropies


def by_definition(documents: list[bytes], order: int) -> float:
    pairs = Counter((d[i - order : i], d[i]) for d in documents for i in range(order, len(d)))
    contexts: Counter[bytes] = Counter()
    for (context, _), n in pairs.items():
        contexts[context] += n
    total = sum(pairs.values())
    return sum(n / total * math.log(contexts[context] / n) for (context, _), n in pairs.items()) if total else 0.0


def measured(documents: list[bytes]) -> Entropies:
    counts = ContextCounts()
    for document in documents:
        counts.add(document)
    return counts.entropies()


def test_known_values() -> None:
    assert measured([]) == Entropies(0, 0.0, 0.0, 0.0)
    assert measured([b"aaaa"]) == Entropies(4, 0.0, 0.0, 0.0)
    ab = measured([b"abababab"])
    assert ab.unigram == pytest.approx(math.log(2))
    assert ab.bigram == 0.0
    mixed = measured([b"aabb" * 400 + b"a"])  # after one byte a coin, after two certainty
    assert mixed.bigram == pytest.approx(math.log(2), rel=1e-3)
    assert mixed.trigram == 0.0


def test_contexts_do_not_cross_documents() -> None:
    apart = measured([b"ab", b"cb", b"ad"])
    assert apart.trigram == 0.0
    assert apart.bigram == pytest.approx(2 / 3 * math.log(2))
    together = measured([b"abcbad"])
    assert together.bigram != pytest.approx(apart.bigram)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=6))
def test_equals_the_definition(documents: list[bytes]) -> None:
    found = measured(documents)
    assert found.bytes == sum(map(len, documents))
    for order, value in enumerate((found.unigram, found.bigram, found.trigram)):
        assert value == pytest.approx(by_definition(documents, order), abs=1e-12)


def test_folding_in_chunks_and_merging_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [bytes((i * j) % 7 for j in range(30)) for i in range(9)]
    whole = measured(documents)
    monkeypatch.setattr(entropy, "_CHUNK", 50)
    left, right = ContextCounts(), ContextCounts()
    for i, document in enumerate(documents):
        (left if i % 2 else right).add(document)
    left.merge(right)
    assert left.entropies() == whole
