"""Typed front door to the native operators, and the counter-based random numbers.

What has run on a GPU, and what is known of the rest, stands in docs/gpu-status.md alone.
"""

import moetrain.ops.flash_attend  # noqa: F401 -- registers attend on CUDA tensors
from moetrain.ops.assign_seats import assign_seats
from moetrain.ops.attend import attend, attend_backward
from moetrain.ops.causal_attention import causal_attention
from moetrain.ops.check_sequence_plan import check_sequence_plan
from moetrain.ops.chunks import add_sources, chunk_table, pack_chunks, unpack_chunks
from moetrain.ops.counter_random import counter_normal, counter_uniform, key_of
from moetrain.ops.expert_mlp import expert_mlp
from moetrain.ops.gather_rows import gather_rows
from moetrain.ops.group_pairs import group_pairs
from moetrain.ops.grouped_gemm import grouped_gemm
from moetrain.ops.grouped_gemm_varlen_k import grouped_gemm_varlen_k
from moetrain.ops.plan_placements import (
    PlannedSeats,
    measure_placements,
    plan_placements,
    reshard_owners,
    split_placements,
)
from moetrain.ops.plan_rows import plan_receives, plan_sends
from moetrain.ops.plan_sequences import PlannedSequences, plan_sequences
from moetrain.ops.rms_norm import rms_norm
from moetrain.ops.rotate import rotate
from moetrain.ops.round_pairs import Offers, RoundedPairs, offer_pairs, round_pairs
from moetrain.ops.route import Routed, route
from moetrain.ops.scatter_add_rows import scatter_add_rows
from moetrain.ops.select_experts import Selection, SelectOptions, select_experts

__all__ = [
    "Offers",
    "PlannedSeats",
    "PlannedSequences",
    "RoundedPairs",
    "Routed",
    "SelectOptions",
    "Selection",
    "add_sources",
    "assign_seats",
    "attend",
    "attend_backward",
    "causal_attention",
    "check_sequence_plan",
    "chunk_table",
    "counter_normal",
    "counter_uniform",
    "expert_mlp",
    "gather_rows",
    "group_pairs",
    "grouped_gemm",
    "grouped_gemm_varlen_k",
    "key_of",
    "measure_placements",
    "offer_pairs",
    "pack_chunks",
    "plan_placements",
    "plan_receives",
    "plan_sends",
    "plan_sequences",
    "reshard_owners",
    "rms_norm",
    "rotate",
    "round_pairs",
    "route",
    "scatter_add_rows",
    "select_experts",
    "split_placements",
    "unpack_chunks",
]
