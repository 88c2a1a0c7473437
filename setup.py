"""Builds the extension, and says which torch it needs; see launch.native."""

import sys
from pathlib import Path

from setuptools import Extension, setup

sys.path.insert(0, str(Path(__file__).parent))
from launch.native.extension import BuildNative
from launch.native.requirements import requirements

setup(
    # No sources that setuptools should know how to compile. Python's limited API: one build for 3.11 and all later.
    ext_modules=[Extension("moetrain._C", sources=[], py_limited_api=True)],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
    install_requires=requirements(sys.argv[1:]),
    cmdclass={"build_ext": BuildNative},
)
