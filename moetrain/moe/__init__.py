"""The MoE layer: router, balance, dispatch, experts. It never asks how many ranks there are."""

from moetrain.moe.balance.state import BalanceReport, BalanceState, max_vio
from moetrain.moe.context import MoEContext, RoutingMemo, checkpoint_contexts, saved_ops
from moetrain.moe.dispatch.all_to_all import AllToAllDispatcher, make_dispatcher
from moetrain.moe.dispatch.contract import Dispatcher, ExpertRows, PendingDispatch
from moetrain.moe.dispatch.local import LocalDispatcher
from moetrain.moe.dispatch.padded import Padding
from moetrain.moe.experts import SharedExpert, run_experts
from moetrain.moe.layer import MoELayer
from moetrain.moe.routers.token_choice import Router, RouterOutput
from moetrain.moe.routing import Routing
from moetrain.moe.rules.rounding import Rounded, Rounding, make_rounding, rounding_score
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
    "PendingDispatch",
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
