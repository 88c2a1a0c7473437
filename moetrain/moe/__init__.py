"""The MoE layer: router, balance, dispatch, experts. It never asks how many ranks there are."""

from moetrain.moe.balance.losses import BalanceLosses, load_balance_loss, z_loss
from moetrain.moe.balance.state import BalanceReport, BalanceState, LayerBalance, max_vio
from moetrain.moe.balance.updates import sign_rule
from moetrain.moe.context import MoEContext, RoutingMemo, checkpoint_contexts, saved_ops
from moetrain.moe.dispatch.all_to_all import AllToAllDispatcher, make_dispatcher
from moetrain.moe.dispatch.contract import Dispatcher, ExpertRows, PendingDispatch
from moetrain.moe.dispatch.local import LocalDispatcher
from moetrain.moe.dispatch.padded import Padding
from moetrain.moe.experts import ExpertWeightsProvider, SharedExpert, run_experts
from moetrain.moe.layer import LayerServices, MoELayer
from moetrain.moe.routers.contract import Router, RouterOutput, RouterStatistics, RoutingMethod
from moetrain.moe.routers.make import make_router
from moetrain.moe.routers.token_choice import TokenChoice
from moetrain.moe.routing import Routing
from moetrain.moe.rules.capacity import Capacity
from moetrain.moe.rules.contract import RoutingRule, RuleOutcome
from moetrain.moe.rules.make import make_rules
from moetrain.moe.rules.rounding import Rounding, make_rounding, rounding_score
from moetrain.ops.activation import activate

__all__ = [
    "AllToAllDispatcher",
    "BalanceLosses",
    "BalanceReport",
    "BalanceState",
    "Capacity",
    "Dispatcher",
    "ExpertRows",
    "ExpertWeightsProvider",
    "LayerBalance",
    "LayerServices",
    "LocalDispatcher",
    "MoEContext",
    "MoELayer",
    "Padding",
    "PendingDispatch",
    "Rounding",
    "Router",
    "RouterOutput",
    "RouterStatistics",
    "Routing",
    "RoutingMemo",
    "RoutingMethod",
    "RoutingRule",
    "RuleOutcome",
    "SharedExpert",
    "TokenChoice",
    "activate",
    "checkpoint_contexts",
    "load_balance_loss",
    "make_dispatcher",
    "make_rounding",
    "make_router",
    "make_rules",
    "max_vio",
    "rounding_score",
    "run_experts",
    "saved_ops",
    "sign_rule",
    "z_loss",
]
