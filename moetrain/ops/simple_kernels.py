"""The warning of operators that have simple kernels on CUDA beside those for tensor cores."""

import warnings
from typing import Any

import torch

from moetrain.ops.native import OPS


def warn_of_simple_kernels(op: str, *args: Any) -> None:
    """Warn, once in a program for each reason, where ``op`` multiplies bf16 on CUDA without tensor cores unasked.

    Asks ``OPS.{op}_obstacle``, which reads dtypes, sizes and strides and waits for nothing. Compiled graphs do not ask.

    Args:
        op: an operator that has such kernels.
        args: what its obstacle depends on, a tensor of the device first.
    """
    if not args[0].is_cuda or torch.compiler.is_compiling():
        return
    obstacle = getattr(OPS, f"{op}_obstacle")(*args)
    if obstacle:
        warnings.warn(
            f"{op} runs its simple kernels, without tensor cores, since the others need {obstacle}; "
            "MOETRAIN_CUDA_PATH=simple silences this",
            stacklevel=1,  # one place: once in a program
        )
