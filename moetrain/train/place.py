"""This process among the others, as a launcher tells it by the environment; read before torch is loaded."""

import os
from dataclasses import dataclass
from typing import Self

from moetrain.config.errors import require


class OwnPlaceError(ValueError):
    """What is wrong with this very rank's environment: others of its machine may have a right one, and say nothing."""


@dataclass(frozen=True, slots=True)
class Place:
    """Rank and number of ranks, on this machine and in all. Without torchrun, one process is the world."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launched: bool = False  # whether torchrun (or the like) set the environment
    restarts: int = 0  # how often torchrun has started these ranks anew, as far as this machine knows

    @classmethod
    def from_environment(cls) -> Self:
        """Read what torchrun sets.

        Raises:
            ValueError: only a part of it is set, or something is no number in its range. With several ranks the place
                of this one on its machine must be set too: without it every rank would count all others as its
                neighbours, and find too few GPUs for them.
        """
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if name not in os.environ]
        if len(missing) == len(names) or ("RANK" in missing and "WORLD_SIZE" in missing):
            return cls()
        if missing:
            raise ValueError(
                f"the environment must set all of {', '.join(names)}, but lacks {', '.join(missing)}; "
                "start with torchrun, or unset RANK and WORLD_SIZE for one process"
            )
        size = number_from_environment("WORLD_SIZE", least=1)
        rank = number_from_environment("RANK", below=size)
        number_from_environment("MASTER_PORT", below=1 << 16)
        absent = [name for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE") if name not in os.environ]
        require(
            size == 1 or not absent,
            f"the environment of each of the {size} ranks must set LOCAL_RANK and LOCAL_WORLD_SIZE, its number among "
            f"the ranks of its machine and how many these are, but lacks {', '.join(absent)}; start with torchrun, or "
            "export what your launcher calls them (srun: SLURM_LOCALID and SLURM_NTASKS_PER_NODE; Open MPI: "
            "OMPI_COMM_WORLD_LOCAL_RANK and OMPI_COMM_WORLD_LOCAL_SIZE)",
        )
        local_size = number_from_environment("LOCAL_WORLD_SIZE", least=1, default=1)
        most = local_size if "LOCAL_WORLD_SIZE" in os.environ else None
        local_rank = number_from_environment("LOCAL_RANK", below=most, default=0)
        restarts = number_from_environment("TORCHELASTIC_RESTART_COUNT", default=0)
        return cls(rank, size, local_rank, local_size, launched=True, restarts=restarts)


def number_from_environment(name: str, *, least: int = 0, below: int | None = None, default: int | None = None) -> int:
    """A whole number in [least, below) that a launcher sets; ``default`` where it is not set at all.

    Raises:
        ValueError: it is something else.
    """
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    is_number = text is not None and text.isascii() and text.isdigit()
    legal = f"at least {least}" if below is None else f"from {least} to {below - 1}"
    if not (text is not None and is_number and int(text) >= least and (below is None or int(text) < below)):
        raise ValueError(
            f"the environment variable {name} must be a whole number {legal}, got {text!r}; start with torchrun, "
            "which sets it, or unset RANK and WORLD_SIZE for one process"
        )
    return int(text)
