"""What setup.py does with the kernels of Hopper, shown with a stand-in for nvcc."""

import os
import subprocess
import sys
from pathlib import Path

from cuda_tools import HOPPER, ROOT

SETUP_WITH_CUDA = """
import sys, torch
from torch.utils import cpp_extension
torch.version.cuda = "13.0"
cpp_extension.CUDA_HOME = sys.argv[1]
cpp_extension.CUDAExtension = cpp_extension.CppExtension  # the real one links against libraries that are not here
def report(self):
    print("objects", *self.extensions[0].extra_objects)
    print("sources", *self.extensions[0].sources)
cpp_extension.BuildExtension.build_extensions = report
sys.argv = ["setup.py", "--quiet", "build_ext", "--build-temp", sys.argv[2]]
exec(open("setup.py").read())
"""


def test_hopper_kernels_are_compiled_for_sm_90a_alone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(f'#!/bin/sh\necho "$@" >> {log}\ntouch "$4"\n')
    nvcc.chmod(0o755)

    def build() -> str:
        command = [sys.executable, "-c", SETUP_WITH_CUDA, str(tmp_path / "cuda"), str(tmp_path / "temp")]
        env = {**os.environ, "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    lines = dict(line.split(" ", 1) for line in build().splitlines() if line.startswith(("objects ", "sources ")))
    names = [path.stem for path in HOPPER]
    assert [Path(path).stem for path in lines["objects"].split()] == names
    assert not any("_sm90" in source for source in lines["sources"].split())
    commands = log.read_text().splitlines()
    assert len(commands) == len(names)
    assert all("code=sm_90a" in command and "sm_80" not in command for command in commands)
    build()
    assert len(log.read_text().splitlines()) == len(names), "unchanged kernels were compiled again"
