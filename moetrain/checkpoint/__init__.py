"""Checkpoints: written whole or not at all, checked when read, loadable on any number of ranks.

What needs torch is imported from its module: ``save_load``, ``folder``, ``shards``.
"""

from moetrain.checkpoint.errors import CorruptCheckpointError, UnsavedCheckpointError
from moetrain.checkpoint.manifest import Manifest
from moetrain.checkpoint.names import list_checkpoints, prune, step_path

__all__ = [
    "CorruptCheckpointError",
    "Manifest",
    "UnsavedCheckpointError",
    "list_checkpoints",
    "prune",
    "step_path",
]
