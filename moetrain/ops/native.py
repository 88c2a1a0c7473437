"""Loads the compiled extension, which registers ``torch.ops.moetrain``.

Every module that calls a native operator takes it from ``OPS`` here, and a native class from ``CLASSES``, so that they
are registered before they are looked up and a missing build is reported once, with its cure.
"""

from typing import Any

import torch

from moetrain.built_with import BUILD, library, require_fit

if found := library():
    require_fit(found, torch.__version__)
try:
    from moetrain import _C
except ImportError as error:
    raise ImportError(
        f"moetrain's native operators did not load ({error}); build them against the torch of this environment with: "
        f"{BUILD}"
    ) from error

OPS = torch.ops.moetrain
CLASSES = torch.classes.moetrain
HAS_CUDA: bool = _C.has_cuda


def multiplies_bf16(device: torch.device | str) -> bool:
    """Whether the device has instructions for bf16 products: Ampere or later; AMX or AVX512_BF16."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and not {"amx", "avx512_bf16"}.isdisjoint(_C.cpu_isas())


def refuse_second_derivative(op: str) -> None:
    """Make differentiating through ``moetrain::{op}_backward`` an error; without it, such a gradient would be missing.

    Raises (in the second backward pass):
        NotImplementedError: a gradient was taken of what ``op``'s backward pass gave.
    """

    def refuse(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"{op}: gradients of its gradients are not built, but a backward pass reached them; take first derivatives "
            f"without create_graph=True, or call moetrain.ops' reference of {op} where second ones are needed"
        )

    torch.library.register_autograd(f"moetrain::{op}_backward", refuse)


__all__ = ["CLASSES", "HAS_CUDA", "OPS", "multiplies_bf16", "refuse_second_derivative"]
