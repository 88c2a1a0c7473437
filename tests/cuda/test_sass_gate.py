"""Compiles the kernels, each of which states what it is, and reads what came out: registers and instructions.

Every ``.cu`` of csrc/cuda has a line near its top::

    // Gate: 168 registers; HGMMA UTMALDG SYNCS USETMAXREG.

On each architecture that the source is compiled for (sm_90a alone for ``*_sm90.cu``), every kernel of the file then
takes at most that many registers and holds each of these SASS instructions.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from cuda_tools import HOPPER, KERNELS, TEST_KERNELS, compile_kernels, require_registers_suffice, run

SOURCES = [*KERNELS, *(path for path in TEST_KERNELS if path.stem.endswith("_sm90"))]
PRODUCTS = {"sm90": "HGMMA", "sm80": "HMMA"}  # what a GEMM of the architecture is made of
GATE = re.compile(r"^// Gate: (\d+) registers; ([A-Z0-9 ]+)\.$", re.MULTILINE)
USAGE = re.compile(r"Compiling entry function '(\S+)'.*?Used (\d+) registers", re.DOTALL)
FUNCTION = re.compile(r"^\.text\.(\S+):\n(.*?)(?=^\.text\.|\Z)", re.MULTILINE | re.DOTALL)
OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z0-9]+)")
SERIALISED = re.compile(r".*(?:serializ|setmaxnreg.*ignored|ignored.*setmaxnreg).*", re.IGNORECASE)

SERIALISED_WGMMA = """
#include "cuda/ptx/wgmma.h"
using namespace moetrain::ptx;
__global__ void __launch_bounds__(128, 1) kernel(float* out, uint64_t a, uint64_t b) {
    float sums[32] = {};
    wgmma_fence();
    wgmma<64>(sums, a, b, true);
    sums[3] += out[threadIdx.x];  // the hardware owns it
    wgmma<64>(sums, a, b, true);
    wgmma_commit();
    wgmma_wait<0>(sums);
    for (int i = 0; i < 32; ++i) out[32 * threadIdx.x + i] = sums[i];
}
"""
IGNORED_SETMAXNREG = """
#include "cuda/ptx/launch.h"
__global__ void kernel(int* out) {
    if (threadIdx.x < 128) moetrain::ptx::shrink_registers<40>();
    else moetrain::ptx::grow_registers<232>();
    out[threadIdx.x] = 1;
}
"""
THRIFTLESS_PRODUCER = """
USETMAXREG.DEALLOC.CTAPOOL 0x28 ;
IADD R39, R2, R3 ;
IADD R40, R2, R3 ;
USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8 ;
IADD R200, R2, R3 ;
"""


@dataclass(frozen=True, slots=True)
class Gate:
    """What a source says of its kernels."""

    max_registers: int
    opcodes: tuple[str, ...]


def gate_of(source: Path) -> Gate:
    stated = GATE.findall(source.read_text())
    assert len(stated) == 1, f"{source.name} must state its gate once, as: // Gate: 168 registers; HGMMA UTMALDG."
    registers, opcodes = stated[0]
    gate = Gate(int(registers), tuple(opcodes.split()))
    product = PRODUCTS.get(source.stem.rpartition("_")[2])
    assert "gemm" not in source.stem or product is None or product in gate.opcodes, (
        f"{source.name} multiplies, so its gate needs {product}"
    )
    return gate


def require_registers_within(ptxas_output: str, gate: Gate) -> None:
    usages = USAGE.findall(ptxas_output)
    assert usages, f"ptxas reported no kernel:\n{ptxas_output}"
    for name, registers in usages:
        assert int(registers) <= gate.max_registers, f"{name} takes {registers} registers, of {gate.max_registers}"


def require_full_speed(ptxas_output: str) -> None:
    complaint = SERIALISED.search(ptxas_output)
    assert complaint is None, f"ptxas makes the kernel slower than written: {complaint[0]}"


def require_opcodes(sass: str, gate: Gate) -> None:
    functions = FUNCTION.findall(sass)
    assert functions, f"no kernel in the disassembly:\n{sass[:500]}"
    for name, body in functions:
        missing = set(gate.opcodes) - set(OPCODE.findall(body))
        assert not missing, f"{name} has no {', '.join(sorted(missing))}"
        require_thrifty_producer(name, body)


def require_thrifty_producer(name: str, body: str) -> None:
    """Between a setmaxnreg.dec and the next setmaxnreg, no register beyond those that were kept is named."""
    for kept, code in re.findall(r"USETMAXREG\.DEALLOC\.CTAPOOL (0x[0-9a-f]+)(.*?)(?=USETMAXREG|\Z)", body, re.DOTALL):
        used = 1 + max(map(int, re.findall(r"\bR(\d+)\b", code)), default=-1)
        assert used <= int(kept, 16), f"{name} keeps {int(kept, 16)} registers in its producer and uses {used}"


def disassemble(nvdisasm: str, folder: Path) -> str:
    return "\n".join(run([nvdisasm, str(cubin)]) for cubin in sorted(folder.glob("*.cubin")))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_kernels_are_what_they_state(nvcc: str, nvdisasm: str, source: Path, tmp_path: Path) -> None:
    gate = gate_of(source)
    output = compile_kernels(nvcc, source, "--keep", "--keep-dir", str(tmp_path))
    require_registers_suffice(output)
    require_registers_within(output, gate)
    require_full_speed(output)
    require_opcodes(disassemble(nvdisasm, tmp_path), gate)


def test_every_kernel_states_its_gate() -> None:
    gates = {path.stem: gate_of(path) for path in KERNELS}
    assert gates["gather_rows"].opcodes == ("LDG", "STG")


def test_there_is_a_kernel_of_hopper() -> None:
    assert "grouped_gemm_sm90" in {path.stem for path in HOPPER}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [(SERIALISED_WGMMA, "serializ"), (IGNORED_SETMAXNREG, "setmaxnreg")],
    ids=["wgmma", "setmaxnreg"],
)
def test_a_kernel_that_ptxas_slows_down_is_refused(nvcc: str, tmp_path: Path, text: str, complaint: str) -> None:
    source = tmp_path / "slow_sm90.cu"
    source.write_text(text)
    output = compile_kernels(nvcc, source)
    with pytest.raises(AssertionError, match=f"slower than written: .*{complaint}"):
        require_full_speed(output)


def test_a_kernel_beyond_its_gate_is_refused(nvcc: str, nvdisasm: str, tmp_path: Path) -> None:
    source = tmp_path / "plain_gemm_sm90.cu"
    source.write_text("// Gate: 1 registers; HGMMA.\n__global__ void twice_kernel(float* x) { x[threadIdx.x] *= 2; }\n")
    output = compile_kernels(nvcc, source, "--keep", "--keep-dir", str(tmp_path))
    with pytest.raises(AssertionError, match=r"twice_kernel\w* takes \d+ registers, of 1"):
        require_registers_within(output, gate_of(source))
    with pytest.raises(AssertionError, match=r"twice_kernel\w* has no HGMMA"):
        require_opcodes(disassemble(nvdisasm, tmp_path), gate_of(source))


def test_a_producer_beyond_its_registers_is_refused() -> None:
    with pytest.raises(AssertionError, match="keeps 40 registers in its producer and uses 41"):
        require_thrifty_producer("kernel", THRIFTLESS_PRODUCER)
    require_thrifty_producer("kernel", THRIFTLESS_PRODUCER.replace("R40", "R38"))


@pytest.mark.parametrize("name", ["gather_rows", "grouped_gemm", "grouped_gemm_sm80"])
def test_a_kernel_without_a_gate_is_refused(tmp_path: Path, name: str) -> None:
    source = tmp_path / f"{name}.cu"
    source.write_text("// Gate: many registers; LDG.\n")
    with pytest.raises(AssertionError, match=rf"{name}\.cu must state its gate"):
        gate_of(source)


@pytest.mark.parametrize("text", ["", "// Gate: 168 registers; UTMALDG.\n"], ids=["nothing stated", "no HGMMA"])
def test_a_gemm_without_a_gate_is_refused(tmp_path: Path, text: str) -> None:
    source = tmp_path / "other_gemm_sm90.cu"
    source.write_text(text)
    with pytest.raises(AssertionError, match=r"other_gemm_sm90\.cu (must state its gate|multiplies)"):
        gate_of(source)
