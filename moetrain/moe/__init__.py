"""The MoE layer: router, balance, dispatch, experts. It never asks how many ranks there are."""

from moetrain.moe.balance import BalanceReport, BalanceState, max_vio
from moetrain.moe.context import MoEContext, RoutingMemo, checkpoint_contexts, saved_ops
from moetrain.moe.dispatch import AllToAllDispatcher, Dispatcher, ExpertRows, LocalDispatcher, Sent, make_dispatcher
from moetrain.moe.experts import SharedExpert, run_experts
from moetrain.moe.layer import MoELayer
from moetrain.moe.padded import Padding
from moetrain.moe.rounding import Rounded, Rounding, make_rounding, rounding_score
from moetrain.moe.router import Router, RouterOutput
from moetrain.moe.routing import Routing
from moetrain.ops.activation import activate

__all__ = [
    "AllToAllDispatcher",
    "BalanceReport",
    "BalanceState",
    "Dispatcher",
    "ExpertRows",
    "LocalDispatcher",
    "MoEContext",
    "MoELayer",
    "Padding",
    "Rounded",
    "Rounding",
    "Router",
    "RouterOutput",
    "Routing",
    "RoutingMemo",
    "Sent",
    "SharedExpert",
    "activate",
    "checkpoint_contexts",
    "make_dispatcher",
    "make_rounding",
    "max_vio",
    "rounding_score",
    "run_experts",
    "saved_ops",
]
