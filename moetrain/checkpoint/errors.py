"""What can be wrong with a checkpoint."""

from pathlib import Path


class CorruptCheckpointError(RuntimeError):
    """A checkpoint is incomplete or not what was written."""

    def __init__(self, path: Path, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"checkpoint {path} is damaged: {reason}; remove it to go on from an older one, or restore it from a copy"
        )
