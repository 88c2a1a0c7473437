"""What docs/building.md says of torch's stable ABI, and why it is not used: what fails here wants that decided anew."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.cpp_extension import include_paths

HEADERS = Path(torch.__file__).parent / "include" / "torch"


@pytest.fixture(scope="module")
def ops(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Operators that are built for the stable ABI of torch 2.11."""
    library = tmp_path_factory.mktemp("stable") / "stable_abi.so"
    system = [flag for path in include_paths() for flag in ("-isystem", path)]
    flags = ["-std=c++20", "-O0", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020b000000000000", *system]
    source = Path(__file__).with_name("stable_abi.cpp")
    torch_lib = Path(torch.__file__).parent / "lib"
    command = [os.environ.get("CXX", "g++"), *flags, str(source), "-o", str(library), f"-L{torch_lib}", "-ltorch_cpu"]
    subprocess.run(command, check=True, timeout=250)
    torch.ops.load_library(str(library))
    return torch.ops.stable_abi


def test_it_can_pass_all_that_our_schemas_have(ops: Any) -> None:
    x, bias = torch.ones(3), torch.zeros(3)
    for score, scale, plain in (("other", 1.0, True), ("first", -1.0, True), ("first", 1.0, False)):
        assert ops.choose(x, score, bias, 0, scale, plain, torch.int32)[0].data_ptr() == bias.data_ptr()
    assert ops.choose(x, "first", bias, 0, 1.0, True, torch.int32)[0].data_ptr() == x.data_ptr()
    chosen, zeros = ops.choose(x, "other", None, 0, 1.0, True, torch.int32)
    assert (chosen.data_ptr(), zeros.dtype, zeros.tolist()) == (x.data_ptr(), torch.int32, [0, 0, 0])
    assert ops.add_sources_(x, [torch.ones(3), torch.full((3,), 2.0)]) is None
    assert x.tolist() == [4.0, 4.0, 4.0]
    assert ops.obstacle(x) == "none"


def test_a_wrong_argument_is_a_runtime_error_that_begins_with_a_path(ops: Any) -> None:
    with pytest.raises(
        RuntimeError, match=r"^choose, \S*stable_abi\.cpp:\d+, choose: k must be at least 0, got -1"
    ) as e:
        ops.choose(torch.ones(3), "first", None, -1, 1.0, True, torch.int32)
    assert not isinstance(e.value, (ValueError, NotImplementedError))


def test_it_knows_no_other_error_and_no_guard_of_dispatch() -> None:
    """Errors of other types, and what keeps autograd out of a call from a worker thread."""
    files = [
        path
        for folder in ("csrc/stable", "csrc/inductor/aoti_torch/c", "headeronly")
        for path in (HEADERS / folder).rglob("*.h")
    ]
    assert len(files) > 50
    text = "\n".join(re.sub(r"//.*", "", path.read_text()) for path in files)
    assert set(re.findall(r"\bthrow (std::\w+|\w+::\w+|\w+)", text)) == {"std::runtime_error"}
    assert not re.search(r"TORCH_CHECK_(VALUE|TYPE)|AutoDispatch|DispatchKeyGuard", text)
