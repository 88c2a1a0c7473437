"""The instruction sets that the CPU kernels' tests run on: all that this machine has, and AMX's source without AMX."""

import os

import pytest

from moetrain import _C

NAMES = [*_C.machine_isas(), "amx_emulated"]


def _parameter(isa: str) -> object:
    # launch/test.sh compiles them all and says so: there, one that is missing fails.
    if isa in _C.built_isas() or os.environ.get("MOETRAIN_BUILD_ISA") == "all":
        return isa
    cure = "MOETRAIN_BUILD_ISA=all python setup.py build_ext --inplace"
    return pytest.param(isa, marks=pytest.mark.skip(reason=f"{isa} is not compiled in; build with {cure}"))


ISAS = [_parameter(isa) for isa in NAMES]
