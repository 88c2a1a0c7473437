"""What can go wrong with a checkpoint."""

from pathlib import Path


class CorruptCheckpointError(RuntimeError):
    """A checkpoint is incomplete or not what was written."""

    def __init__(self, path: Path, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"checkpoint {path} is damaged: {reason}; remove it to go on from an older one, or restore it from a copy"
        )


class UnsavedCheckpointError(RuntimeError):
    """A checkpoint could not be written, for example because the disk is full; those before it are as they were."""

    def __init__(self, path: Path, reason: str) -> None:
        self.reason = reason
        super().__init__(
            f"checkpoint {path} could not be saved: {reason}; free space or mend what is said there, or move the run's "
            "folder and name it with --run-dir, and start again: what was saved before is whole"
        )
