"""Typed front door to the native operators, and the counter-based random numbers."""

from moetrain.ops.pairs import group_pairs

__all__ = ["group_pairs"]
