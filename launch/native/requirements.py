"""What moetrain asks of pip: the sources any torch that they are tried with, a build the one that it was built with.

libtorch's C++ interface holds within one minor version: see docs/building.md.
"""

from collections.abc import Sequence

from launch.native.torch_home import find_torch

TORCH = "torch>=2.11"
OTHERS = ("numpy", "rich", "safetensors", "tyro")
BUILDS = ("bdist_wheel", "dist_info", "editable_wheel")  # of setup.py's commands, those whose metadata is a build's


def requirements(commands: Sequence[str]) -> list[str]:
    """Lines of ``Requires-Dist``, by what setup.py was called with; a build without torch ends in an error later."""
    if set(commands).isdisjoint(BUILDS):
        return [TORCH, *OTHERS]
    try:
        major, minor = find_torch().version.split(".")[:2]
    except ValueError:
        return [TORCH, *OTHERS]
    return [f"torch=={major}.{minor}.*", *OTHERS]
