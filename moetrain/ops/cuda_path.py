"""Which kernels ``expert_mlp`` runs on CUDA: Hopper's own ("sm90"), or other operators one after another ("composed").

Shapes: D width, F hidden width, S slots.
"""

import os
import warnings
from typing import Literal

import torch
from torch import Tensor

CudaPath = Literal["sm90", "composed"]
CUDA_PATHS: tuple[CudaPath, ...] = ("sm90", "composed")
VARIABLE = "MOETRAIN_CUDA_PATH"
ALIGNED_BYTES = 16


def wanted_cuda_path() -> CudaPath | None:
    """What ``MOETRAIN_CUDA_PATH`` asks for, read at each call; None where it is not set.

    Raises:
        ValueError: it names no path.
    """
    wanted = os.environ.get(VARIABLE) or None
    if wanted is not None and wanted not in CUDA_PATHS:
        raise ValueError(f"{VARIABLE} must be {' or '.join(CUDA_PATHS)}, got {wanted}; unset it to let moetrain choose")
    return wanted


def choose_cuda_path(x_RD: Tensor, w_in: Tensor, w_out: Tensor, *biases: Tensor | None) -> CudaPath:
    """The path for these inputs of ``expert_mlp``, which are on CUDA: Hopper's kernels wherever they can run.

    Warns, once in a program, where they cannot and nobody asked for "composed".

    Raises:
        ValueError: ``MOETRAIN_CUDA_PATH`` names no path, or "sm90" where the kernels cannot run.
    """
    wanted = wanted_cuda_path()
    if wanted == "composed":
        return wanted
    obstacle = obstacle_to_sm90(torch.cuda.get_device_capability(x_RD.device), x_RD, w_in, w_out, *biases)
    if obstacle is None:
        return "sm90"
    if wanted == "sm90":
        raise ValueError(f"{VARIABLE} is sm90, but expert_mlp's kernels for it need {obstacle}; set it to composed")
    warnings.warn(
        f"expert_mlp runs as separate operators, slower and with more memory: its kernels for sm_90 need {obstacle}; "
        f"{VARIABLE}=composed silences this",
        stacklevel=3,
    )
    return "composed"


def obstacle_to_sm90(
    capability: tuple[int, int], x_RD: Tensor, w_in: Tensor, w_out: Tensor, *biases: Tensor | None
) -> str | None:
    """What the kernels need and these inputs do not have, or None.

    Args:
        capability: the device's compute capability, major and minor.
        x_RD: ``[R, D]``; of it only dtype and width count, rows are copied where they are not aligned.
        w_in: ``[S, 2 or 1, F, D]``.
        w_out: ``[S, D, F]``.
        biases: ``[S, 2 or 1, F]`` and ``[S, D]``, or None.
    """
    width, hidden = x_RD.shape[-1], w_out.shape[-1]
    if capability[0] != 9:
        return f"compute capability 9.0, this device has {capability[0]}.{capability[1]}"
    if x_RD.dtype != torch.bfloat16:
        return f"bfloat16, got {str(x_RD.dtype).removeprefix('torch.')}"
    if width % 8 or hidden % 8:
        return f"D and F to be multiples of 8, got {width} and {hidden}"
    for name, tensor in zip(("w_in", "w_out", "b_in", "b_out"), (w_in, w_out, *biases), strict=False):
        if tensor is not None and not _is_aligned(tensor):
            return f"{name} at multiples of {ALIGNED_BYTES} bytes, got strides {tensor.stride()}"
    for name, tensor in zip(("w_in", "b_in"), (w_in, biases[0] if biases else None), strict=True):
        if tensor is not None and not _parts_adjoin(tensor):
            return f"gate and up of {name} to adjoin, got strides {tensor.stride()}"
    return None


def _is_aligned(tensor: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes, as allocations do."""
    places = [tensor.storage_offset()]
    places += [stride for stride, size in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if size > 1]
    return all(place * tensor.element_size() % ALIGNED_BYTES == 0 for place in places)


def _parts_adjoin(tensor: Tensor) -> bool:
    """Whether the parts (dim 1) of each slot follow one another without a gap."""
    part = tensor[0] if tensor.shape[0] else tensor.new_empty(tensor.shape[1:])
    return part.shape[0] == 1 or part.stride(0) == part.shape[1] * (part.stride(1) if part.dim() > 2 else 1)
