from pathlib import Path


def hidden(folder: Path) -> list[Path]:
    """What is in ``folder`` under names that begin with a dot."""
    return [path for path in folder.iterdir() if path.name.startswith(".")]
