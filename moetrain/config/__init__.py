"""Frozen configuration, validated when made."""

from moetrain.config.errors import NotBuiltYetError
from moetrain.config.load import load_run, run_from_dict, to_dict, to_toml
from moetrain.config.mesh import ATTENTION_AXES, EXPERT_AXES, MeshConfig, mesh_from_axes, parse_axes
from moetrain.config.model import ModelConfig
from moetrain.config.moe import BalanceConfig, DispatchConfig, MoEConfig, MoELayerConfig, RouterConfig
from moetrain.config.options import options_help
from moetrain.config.placement import PlacementConfig
from moetrain.config.presets import PRESETS, preset
from moetrain.config.run import RunConfig
from moetrain.config.sequence import SequenceConfig
from moetrain.config.train import CheckpointConfig, DataConfig, OptimConfig, StartConfig, TrainConfig

__all__ = [
    "ATTENTION_AXES",
    "EXPERT_AXES",
    "PRESETS",
    "BalanceConfig",
    "CheckpointConfig",
    "DataConfig",
    "DispatchConfig",
    "MeshConfig",
    "MoEConfig",
    "MoELayerConfig",
    "ModelConfig",
    "NotBuiltYetError",
    "OptimConfig",
    "PlacementConfig",
    "RouterConfig",
    "RunConfig",
    "SequenceConfig",
    "StartConfig",
    "TrainConfig",
    "load_run",
    "mesh_from_axes",
    "options_help",
    "parse_axes",
    "preset",
    "run_from_dict",
    "to_dict",
    "to_toml",
]
