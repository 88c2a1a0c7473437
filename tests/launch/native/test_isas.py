"""What MOETRAIN_BUILD_ISA compiles, and what is chosen from it at run time."""

import shlex
import subprocess
from os import environ
from pathlib import Path
from platform import machine as processor

import pytest

from launch.native.isas import ISAS, clone_flags, find_isas_of_machine, isas_to_build
from moetrain import _C

ROOT = Path(__file__).parents[3]
EPYC = ["avx512_bf16", "avx512", "avx2", "portable"]


@pytest.mark.parametrize(
    ("wanted", "machine", "built"),
    [
        ("", EPYC, ["avx512_bf16", "avx512", "portable"]),
        ("native", ["amx", *EPYC], ["amx", "avx512", "portable"]),
        ("native", ["avx2", "portable"], ["avx2", "portable"]),
        ("native", ["portable"], ["portable"]),
        ("all", ["portable"], list(ISAS)),
        ("portable", EPYC, ["portable"]),
        ("portable, avx2", EPYC, ["avx2", "portable"]),
        ("amx_emulated", EPYC, ["portable", "amx_emulated"]),
    ],
)
def test_what_is_compiled(wanted: str, machine: list[str], built: list[str]) -> None:
    assert isas_to_build(wanted, lambda: machine) == built


@pytest.mark.parametrize("wanted", ["sse9", "avx2,sse9", "all,portable", "native,avx2"])
def test_an_unknown_name_is_refused_with_those_that_there_are(wanted: str) -> None:
    with pytest.raises(ValueError, match=r"MOETRAIN_BUILD_ISA must be native, all or a list of amx, .* got '" + wanted):
        isas_to_build(wanted, lambda: EPYC)


@pytest.mark.skipif(processor() != "x86_64", reason="functions are cloned on x86-64 alone")
@pytest.mark.parametrize(
    ("built", "names"),
    [
        (ISAS, '"arch=x86-64-v4","arch=x86-64-v3","default"'),
        (["avx512_bf16", "avx512", "portable"], '"arch=x86-64-v4","default"'),
        (["avx2", "portable"], '"arch=x86-64-v3","default"'),
        (["portable"], '"arch=x86-64-v4","arch=x86-64-v3","default"'),
    ],
)
def test_whole_functions_are_cloned_for_what_is_built(built: list[str], names: str, tmp_path: Path) -> None:
    assert clone_flags(built) == [f"-DMOETRAIN_CLONES_FOR={names}"]
    source, library = tmp_path / "f.cpp", tmp_path / "f.o"
    source.write_text('#include "common/clones.h"\nMOETRAIN_CLONES int f(int x) { return x + 1; }\n')
    compiler = shlex.split(environ.get("CXX", "g++"))
    subprocess.run([*compiler, *clone_flags(built), f"-I{ROOT / 'csrc'}", "-c", source, "-o", library], check=True)
    symbols = subprocess.check_output(["nm", library], text=True)
    for name in ("arch=x86-64-v4", "arch=x86-64-v3", "default"):
        assert (f".{name.replace('=', '_').replace('-', '_')}" in symbols) == (f'"{name}"' in names), symbols


def test_every_name_is_a_file_and_the_extension_knows_them_by_it() -> None:
    assert {f"isa_{isa}.cpp" for isa in ISAS} == {path.name for path in (ROOT / "csrc/cpu/isa").glob("isa_*.cpp")}
    assert set(_C.built_isas()) <= set(ISAS)


def test_the_build_and_the_extension_find_the_same_machine(tmp_path: Path) -> None:
    compiler = shlex.split(environ.get("CXX", "g++"))
    assert find_isas_of_machine(ROOT / "csrc", compiler, tmp_path) == _C.machine_isas()


@pytest.fixture(scope="module")
def chooser(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("choose") / "choose"
    source = Path(__file__).with_name("choose.cpp")
    compiler = shlex.split(environ.get("CXX", "g++"))
    subprocess.check_call([*compiler, "-std=c++20", f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)])
    return program


@pytest.mark.parametrize(
    ("wanted", "machine", "built", "chosen"),
    [
        ("", "avx512,avx2,portable", "avx512,avx2,portable", "avx512"),
        ("", "avx512,avx2,portable", "amx,avx2,portable", "avx2"),
        ("", "avx512,avx2,portable", "portable", "portable"),
        ("", "portable", "amx,avx512,portable", "portable"),
        ("avx2", "avx512,avx2,portable", "avx512,avx2,portable", "avx2"),
        ("amx_emulated", "portable", "portable,amx_emulated", "amx_emulated"),
    ],
)
def test_the_best_that_is_compiled_and_supported_runs(
    chooser: Path, wanted: str, machine: str, built: str, chosen: str
) -> None:
    assert subprocess.check_output([chooser, wanted, machine, built], text=True) == f"{chosen}\n"


@pytest.mark.parametrize(
    ("wanted", "machine", "built", "words"),
    [
        ("avx512", "avx2,portable", "avx512,portable", "one of avx2, portable (what this machine has)"),
        ("avx2", "avx512,avx2,portable", "avx512,portable", "one of avx512, portable (what this machine has and"),
        ("avx2", "avx2,portable", "portable", "got avx2; unset it, or build again with MOETRAIN_BUILD_ISA=all"),
        ("amx_emulated", "portable", "portable", "MOETRAIN_BUILD_ISA=amx_emulated"),
        ("sse9", "portable", "portable", "got sse9; unset it"),
    ],
)
def test_what_cannot_run_is_refused_with_the_cure(
    chooser: Path, wanted: str, machine: str, built: str, words: str
) -> None:
    done = subprocess.run([chooser, wanted, machine, built], capture_output=True, text=True)
    assert (done.returncode, words in done.stdout) == (1, True), done.stdout
