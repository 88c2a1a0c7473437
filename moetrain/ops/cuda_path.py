"""How ``expert_mlp`` runs on CUDA.

Paths, best first; the first that fits the device, the dtype and the shapes is taken, the same for every call like it:

- "sm90": kernels for Hopper alone (wgmma, TMA), bf16.
- "sm80": kernels for compute capability 8.0 and later (mma.sync), bf16.
- "grouped_mm": products by ``torch._grouped_mm`` on compute capability 9.x and 10.x, bf16 with D and F multiples of 8;
  chosen where the kernels above cannot read the weights in place, since it copies those that are not aligned.
- "simple": products by this package's ``grouped_gemm`` operators, which take every dtype and size. What ends here
  mostly runs on their simple kernels, without tensor cores, and is slow.
- "loop": ``torch.mm``, one expert after another. Never chosen, only forced: it reads the offsets, so the host waits for
  the device, and CUDA graphs cannot hold it. For debugging, as what no kernel of this package multiplies.

``MOETRAIN_CUDA_PATH`` forces one, on Hopper also sm80. The operators ``grouped_gemm`` and ``grouped_gemm_varlen_k``
choose by themselves between sm90, sm80 and simple, and hear the same variable where it names one of these. No path but
loop waits for the device. docs/gpu-status.md says what each is known by.

Shapes: R rows, D width, F hidden width, E experts, S slots.
"""

import os
import warnings
from typing import Literal

import torch
from torch import Tensor

from moetrain.ops.expert_inputs import ExpertInputs
from moetrain.ops.expert_products import ALIGNED_BYTES, MAX_GROUPED_MM_GROUPS, is_aligned, is_shared

CudaPath = Literal["sm90", "sm80", "grouped_mm", "simple", "loop"]
CUDA_PATHS: tuple[CudaPath, ...] = ("sm90", "sm80", "grouped_mm", "simple", "loop")
NATIVE_PATHS: tuple[CudaPath, ...] = ("sm90", "sm80")
VARIABLE = "MOETRAIN_CUDA_PATH"
MAX_LISTED_SLOTS = 12000  # as the kernels' kMaxExpertsToGroup
INT32_MAX = 2**31 - 1


def wanted_cuda_path() -> CudaPath | None:
    """What ``MOETRAIN_CUDA_PATH`` asks for, read at each call; None where it is not set.

    Raises:
        ValueError: it names no path.
    """
    wanted = os.environ.get(VARIABLE) or None
    if wanted is None or wanted in CUDA_PATHS:
        return wanted
    raise ValueError(
        f"{VARIABLE} must be {', '.join(CUDA_PATHS[:-1])} or {CUDA_PATHS[-1]}, got {wanted}; unset it to let moetrain "
        "choose"
    )


def choose_cuda_path(inputs: ExpertInputs) -> CudaPath:
    """The path for these inputs of ``expert_mlp``, which are on CUDA. Called as the operator runs, never traced.

    Reads dtypes, sizes and strides, no values. Warns, once in a program for each reason, where no kernel of its own
    fits and nobody asked for what runs instead.

    Raises:
        ValueError: ``MOETRAIN_CUDA_PATH`` names no path, or one that cannot run these.
    """
    wanted = wanted_cuda_path()
    capability = torch.cuda.get_device_capability(inputs.x_RD.device)
    if wanted is not None:
        obstacle = obstacle_to(wanted, capability, inputs)
        if obstacle is not None:
            raise ValueError(
                f"{VARIABLE} is {wanted}, which for expert_mlp needs {obstacle}; unset it to let moetrain choose"
            )
        return wanted
    path, obstacle = best_path(capability, inputs)
    if obstacle is not None:
        warnings.warn(
            f"expert_mlp runs from separate products ({path}), slower and with more memory, since its own kernels need "
            f"{obstacle}; {VARIABLE}={path} silences this",
            stacklevel=1,  # one place: once in a program
        )
    return path


def best_path(capability: tuple[int, int], inputs: ExpertInputs) -> tuple[CudaPath, str | None]:
    """The best path that fits, and what kept it from being one of ``NATIVE_PATHS``, or None."""
    path = next(path for path in CUDA_PATHS if obstacle_to(path, capability, inputs) is None)
    return path, None if path in NATIVE_PATHS else obstacle_to("sm80", capability, inputs)


def obstacle_to(path: CudaPath, capability: tuple[int, int], inputs: ExpertInputs) -> str | None:
    """What the path needs and these inputs do not have, or None.

    Args:
        path: one of ``CUDA_PATHS``.
        capability: the device's compute capability, major and minor.
        inputs: of x only dtype and width count; rows are copied where they are not aligned.
    """
    if path in ("simple", "loop") or not _has_dims(inputs):
        return None  # what no path takes, the operators refuse, and say why
    lowest = {"sm90": "9.0", "sm80": "8.0 or later", "grouped_mm": "9.x or 10.x"}[path]
    fits = {"sm90": capability[0] == 9, "sm80": capability[0] >= 8, "grouped_mm": capability[0] in (9, 10)}[path]
    if not fits:
        return f"compute capability {lowest}, this device has {capability[0]}.{capability[1]}"
    if inputs.x_RD.dtype != torch.bfloat16:
        return f"bfloat16, got {str(inputs.x_RD.dtype).removeprefix('torch.')}"
    width, hidden = inputs.x_RD.shape[-1], inputs.w_out.shape[-1]
    if width % 8 or hidden % 8:
        return f"D and F to be multiples of 8, got {width} and {hidden}"
    return _obstacle_to_grouped_mm(inputs) if path == "grouped_mm" else _obstacle_to_kernels(inputs)


def paths_of(capability: tuple[int, int]) -> dict[str, CudaPath]:
    """The best path for each class of inputs on a device of that compute capability; what a report shows.

    The classes: bf16 that fits the kernels, bf16 in weights that they cannot read in place, and everything else.
    """

    def inputs(dtype: torch.dtype, width: int, w_in_row: int) -> ExpertInputs:
        floats = [torch.empty(sizes, dtype=dtype, device="meta") for sizes in ((1, width), (1, width, 8))]
        w_in = torch.empty(1, 2, 8, w_in_row, dtype=dtype, device="meta")[..., :width]
        ints = torch.empty(2, dtype=torch.int32, device="meta")
        return ExpertInputs(floats[0], row_N=ints, weight_N=ints.float(), offset_E1=ints, w_in=w_in, w_out=floats[1])

    classes = {
        "bf16, D and F multiples of 8": inputs(torch.bfloat16, 8, 8),
        "in unaligned weights": inputs(torch.bfloat16, 8, 9),
        "everything else": inputs(torch.float32, 8, 8),
    }
    return {name: best_path(capability, example)[0] for name, example in classes.items()}


def _obstacle_to_grouped_mm(inputs: ExpertInputs) -> str | None:
    num_experts = inputs.offset_E1.shape[0] - 1
    if num_experts > MAX_GROUPED_MM_GROUPS:
        return f"at most {MAX_GROUPED_MM_GROUPS} experts, got {num_experts}"
    return _obstacle_to_rows(inputs)


def _obstacle_to_kernels(inputs: ExpertInputs) -> str | None:
    weights = {"w_in": inputs.w_in, "w_out": inputs.w_out, "b_in": inputs.b_in, "b_out": inputs.b_out}
    for name, tensor in weights.items():
        if tensor is not None and not is_aligned(tensor):
            return f"{name} at multiples of {ALIGNED_BYTES} bytes, got strides {tuple(tensor.stride())}"
    for name in ("w_in", "b_in"):
        tensor = weights[name]
        if tensor is not None and not _parts_adjoin(tensor):
            return f"gate and up of {name} to adjoin, got strides {tuple(tensor.stride())}"
    if inputs.slot_E is not None and inputs.num_slots > MAX_LISTED_SLOTS:
        return f"at most {MAX_LISTED_SLOTS} slots, got {inputs.num_slots}"
    return _obstacle_to_rows(inputs) or _obstacle_to_sharing({"w_in": inputs.w_in, "w_out": inputs.w_out})


def _obstacle_to_rows(inputs: ExpertInputs) -> str | None:
    rows = inputs.num_slots * max(inputs.w_in.shape[1] * inputs.w_in.shape[2], inputs.w_out.shape[1])
    if rows > INT32_MAX:
        return f"slots times rows of a slot to be at most {INT32_MAX}, got {rows}"
    return None


def _obstacle_to_sharing(weights: dict[str, Tensor]) -> str | None:
    for name, w in weights.items():
        if is_shared(w):  # the kernels take a stride of 0 for no gaps
            return f"a matrix of its own for each slot of {name}, got strides {tuple(w.stride())}"
    return None


def _has_dims(inputs: ExpertInputs) -> bool:
    """Whether the tensors have as many dimensions as ``expert_mlp`` demands."""
    dims = {2: (inputs.x_RD, inputs.b_out), 1: (inputs.offset_E1,), 4: (inputs.w_in,), 3: (inputs.w_out, inputs.b_in)}
    return all(tensor is None or tensor.dim() == dim for dim, tensors in dims.items() for tensor in tensors)


def _parts_adjoin(tensor: Tensor) -> bool:
    """Whether the parts (dim 1) of each slot follow one another without a gap."""
    row_stride = tensor.stride(2) if tensor.dim() > 3 else 1
    return tensor.shape[1] == 1 or tensor.stride(1) == tensor.shape[2] * row_stride
