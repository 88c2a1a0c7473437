"""Corpora, tokenizers, indexed datasets, packing. The loader, which needs torch, is imported from its module."""

from moetrain.data.corpus import quickstart_sources
from moetrain.data.dataset import PackedDataset, PackedRow
from moetrain.data.entropy import ContextCounts, Entropies
from moetrain.data.indexed import IndexedReader, IndexedWriter
from moetrain.data.manifest import DomainInfo, Manifest, SplitInfo
from moetrain.data.prep import prepare
from moetrain.data.sources import Source
from moetrain.data.tokenizer import ByteTokenizer, tokenizer_named

__all__ = [
    "ByteTokenizer",
    "ContextCounts",
    "DomainInfo",
    "Entropies",
    "IndexedReader",
    "IndexedWriter",
    "Manifest",
    "PackedDataset",
    "PackedRow",
    "Source",
    "SplitInfo",
    "prepare",
    "quickstart_sources",
    "tokenizer_named",
]
