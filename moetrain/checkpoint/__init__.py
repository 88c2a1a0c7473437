"""Checkpoints: written whole or not at all, checked when read, loadable on any number of ranks."""

from moetrain.checkpoint.errors import CorruptCheckpointError, UnsavedCheckpointError
from moetrain.checkpoint.folder import find_latest, find_verified, list_checkpoints, prune, step_path, verify
from moetrain.checkpoint.manifest import Manifest
from moetrain.checkpoint.pieces import LogicalTensor, Piece, State
from moetrain.checkpoint.save_load import load, save

__all__ = [
    "CorruptCheckpointError",
    "LogicalTensor",
    "Manifest",
    "Piece",
    "State",
    "UnsavedCheckpointError",
    "find_latest",
    "find_verified",
    "list_checkpoints",
    "load",
    "prune",
    "save",
    "step_path",
    "verify",
]
