"""Where sequences go this step."""

from moetrain.sequence.batch import PackedBatch
from moetrain.sequence.data_planner import plan_data, plan_sequences
from moetrain.sequence.plan import HEADER_LENGTH, Item, Sequence, SequencePlan

__all__ = [
    "HEADER_LENGTH",
    "Item",
    "PackedBatch",
    "Sequence",
    "SequencePlan",
    "plan_data",
    "plan_sequences",
]
