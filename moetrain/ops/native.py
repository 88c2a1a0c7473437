"""Loads the compiled extension, which registers ``torch.ops.moetrain``.

Every module of this package that calls a native operator takes it from ``OPS`` here, so that the operators are
registered before they are looked up and a missing build is reported once, with its cure.
"""

import torch

try:
    from moetrain import _C
except ImportError as error:
    raise ImportError(
        f"moetrain's native operators did not load ({error}); build them against the torch of this environment with: "
        "pip install --no-build-isolation --no-deps -e ."
    ) from error

OPS = torch.ops.moetrain
HAS_CUDA: bool = _C.has_cuda

__all__ = ["HAS_CUDA", "OPS"]
