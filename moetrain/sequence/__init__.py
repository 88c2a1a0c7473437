"""Where sequences go this step."""

from moetrain.sequence.batch import GangShare, PackedBatch, Piece
from moetrain.sequence.data_planner import plan_data
from moetrain.sequence.pack import OpenSequence, SequenceSource, pack_item
from moetrain.sequence.plan import Item, Sequence, SequencePlan
from moetrain.sequence.planner import StepPlanner

__all__ = [
    "GangShare",
    "Item",
    "OpenSequence",
    "PackedBatch",
    "Piece",
    "Sequence",
    "SequencePlan",
    "SequenceSource",
    "StepPlanner",
    "pack_item",
    "plan_data",
]
