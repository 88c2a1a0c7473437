"""Frozen configuration, validated when made."""

from moetrain.config.errors import NotBuiltYetError
from moetrain.config.mesh import ATTENTION_AXES, EXPERT_AXES, MeshConfig, mesh_from_axes, parse_axes
from moetrain.config.model import ModelConfig, MoEConfig
from moetrain.config.run import RunConfig
from moetrain.config.train import CheckpointConfig, DataConfig, OptimConfig, TrainConfig

__all__ = [
    "ATTENTION_AXES",
    "EXPERT_AXES",
    "CheckpointConfig",
    "DataConfig",
    "MeshConfig",
    "MoEConfig",
    "ModelConfig",
    "NotBuiltYetError",
    "OptimConfig",
    "RunConfig",
    "TrainConfig",
    "mesh_from_axes",
    "parse_axes",
]
