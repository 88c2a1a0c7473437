"""Corpora, tokenizers, indexed datasets, packing, the loader."""
