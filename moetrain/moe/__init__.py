"""The MoE layer: router, balance, dispatch, experts. It never asks how many ranks there are."""

from moetrain.moe.balance import BalanceReport, BalanceState, max_vio
from moetrain.moe.context import MoEContext, RoutingMemo, checkpoint_contexts, saved_ops
from moetrain.moe.dispatch import AllToAllDispatcher, Dispatched, Dispatcher, LocalDispatcher, make_dispatcher
from moetrain.moe.experts import SharedExpert, run_experts
from moetrain.moe.layer import MoELayer
from moetrain.moe.rounding import Rounded, Rounding, make_rounding, rounding_score
from moetrain.moe.router import Router, RouterOutput
from moetrain.moe.routing import Routing
from moetrain.ops.activation import activate

__all__ = [
    "AllToAllDispatcher",
    "BalanceReport",
    "BalanceState",
    "Dispatched",
    "Dispatcher",
    "LocalDispatcher",
    "MoEContext",
    "MoELayer",
    "Rounded",
    "Rounding",
    "Router",
    "RouterOutput",
    "Routing",
    "RoutingMemo",
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
