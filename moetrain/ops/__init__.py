"""Typed front door to the native operators, and the counter-based random numbers."""

from moetrain.ops.pairs import group_pairs
from moetrain.ops.select import Selection, select_experts

__all__ = ["Selection", "group_pairs", "select_experts"]
