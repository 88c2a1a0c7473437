"""The router that a configuration asks for."""

from moetrain.config import MoELayerConfig
from moetrain.moe.routers.contract import Router
from moetrain.moe.routers.token_choice import TokenChoice


def make_router(config: MoELayerConfig, width: int) -> Router:
    """The router of a layer of tokens [T, ``width``]: its scores, and the method that chooses by them."""
    moe = config.moe
    return Router(moe.num_experts, width, TokenChoice(moe.top_k, config.router))
