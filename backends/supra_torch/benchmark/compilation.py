"""What a kernel needs of a GPU, found by compiling it without one.

Registers a thread, bytes spilled, shared memory a program, and which tensor-core instruction the
code contains. Triton's own wheel brings the assembler.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

from supra_torch.ops.triton_kernels import scan_kernel, segment_kernel
from supra_torch.ops.triton_table import SHARED_MEMORY, block_of, tiles_for

TYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
"""Bytes of an element, by Triton's name of its type; fp32 is multiplied as TF32."""

_TENSOR_CORES = ("tcgen05.mma", "wgmma.mma_async", "mma.sync")


@dataclass(frozen=True)
class Case:
    """One compilation: ``kernel`` scan or segment; mask, packing and segments as switches."""

    kernel: str
    role: str
    normalise: bool
    dtype: str
    key_size: int
    value_size: int
    capability: int
    masked: bool = False
    packed: bool = False

    @property
    def row_size(self) -> int:
        """Channels of the query role, the state's rows."""
        return self.value_size if self.role in ("dq", "dk") else self.key_size

    @property
    def column_size(self) -> int:
        """Channels of the value role, the state's columns."""
        return self.key_size if self.role in ("dq", "dk") else self.value_size


@dataclass(frozen=True)
class Resources:
    """What the compiler and the assembler say of one case."""

    registers: int
    spilled: int
    """Bytes stored to and loaded from memory because registers ran out, a thread."""
    shared: int
    """Bytes a program."""
    instruction: str
    """The tensor-core instruction in the code, or an empty text."""


def compile_case(case: Case) -> Resources:
    """Compile one case for its architecture; raises what Triton raises when it does not compile."""
    kernel = scan_kernel if case.kernel == "scan" else segment_kernel
    tiles = tiles_for(
        case.capability,
        TYPES[case.dtype],
        case.row_size,
        case.column_size,
        masked=case.masked or case.packed,
    )
    constants = _constants(case, tiles.block_t, tiles.block_v)
    signature, attributes = _signature(kernel.arg_names, constants, case.dtype)
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", case.capability, 32),
        options={"num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True},
    )
    ptx = compiled.asm["ptx"]
    registers, spilled = _assemble(ptx, case.capability)
    found = [name for name in _TENSOR_CORES if name in ptx]
    return Resources(registers, spilled, compiled.metadata.shared, found[0] if found else "")


def complaints(case: Case, found: Resources) -> list[str]:
    """What is wrong with a compiled case: no tensor cores, spills at d <= 128, too much memory."""
    wrong = []
    if not found.instruction:
        wrong.append("no tensor-core instruction")
    if found.spilled and max(case.key_size, case.value_size) <= 128:
        wrong.append(f"{found.spilled} bytes spilled")
    if found.shared > SHARED_MEMORY[case.capability]:
        wrong.append(f"{found.shared} bytes of shared memory")
    return wrong


def _constants(case: Case, block_t: int, block_v: int) -> dict[str, Any]:
    """The kernel's compile-time arguments, None for the pointers that this case leaves out."""
    scan = case.kernel == "scan"
    absent = [] if case.masked else ["counted"]
    absent += [] if case.packed else ["borders"]
    if case.role == "output" or not case.normalise:
        absent += ["scale", "shift"]
    elif case.role == "dv":
        absent += ["shift"]
    if not case.normalise or case.role == "dv":
        absent += ["vectors"]
    if scan:
        absent += [] if case.normalise and case.role == "output" else ["sums"]
        absent += [] if case.role in ("dq", "dk") else ["partner", "dots"]
        # Masked and packed cases also go on from a state and in segments: everything at once.
        absent += [] if case.packed else ["states", "vectors", "tokens"]
        if not case.packed and case.role != "output":
            absent += ["initial", "initial_vector"]
        if case.role in ("dq", "dv"):
            absent += ["final", "final_vector"]
        if not case.normalise or case.role == "dv":
            absent += ["initial_vector", "final_vector"]
    constants: dict[str, Any] = dict.fromkeys(absent)
    if scan:
        unit = "k" if case.role in ("dq", "dk") else "v"
        constants |= {f"state_{unit}": 1, f"final_{unit}": 1}
    return constants | {
        "ROLE": case.role, "NORMALISE": case.normalise,
        "K": case.row_size, "V": case.column_size,
        "BLOCK_T": block_t, "BLOCK_K": block_of(case.row_size), "BLOCK_V": block_v,
    }  # fmt: skip


_FLOAT32 = {
    "log2_decay", "scale", "shift", "sums", "initial", "initial_vector", "final", "final_vector",
    "states", "vectors", "tokens",
    "dots",
}  # fmt: skip
_OPERANDS = {"q", "k", "v", "output", "partner"}


def _signature(
    names: Sequence[str], constants: dict[str, Any], dtype: str
) -> tuple[dict[str, str], dict[tuple[int], list[list[Any]]]]:
    """Types of the arguments, and that pointers and strides are multiples of 16."""
    signature, attributes = {}, {}
    for index, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = True
        if name in _OPERANDS:
            signature[name] = f"*{dtype}"
        elif name in _FLOAT32:
            signature[name] = "*fp32"
        elif name == "counted":
            signature[name] = "*i32"
        elif name == "borders":
            signature[name] = "*i64"
        else:
            pointer = False
            signature[name] = "i32"
        if pointer or re.fullmatch(r"(q|k|v|partner)_[bth]|(state|final)_[kv]", name):
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, attributes


def _assemble(ptx: str, capability: int) -> tuple[int, int]:
    """Registers a thread and bytes spilled, as the assembler reports them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        report = subprocess.run(
            [
                get_ptxas(capability).path, "-v", str(source), "-o", str(source) + ".cubin",
                f"--gpu-name={sm_arch_from_capability(capability)}",
            ],
            check=True, capture_output=True, text=True,
        ).stderr  # fmt: skip
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    if registers is None or not spills:
        raise RuntimeError(f"the assembler's report is not understood: {report}")
    return int(registers.group(1)), sum(int(count) for count in spills)


def assembler_version() -> str:
    """The release of the assembler that Triton brings."""
    text = subprocess.run(
        [get_ptxas(80).path, "--version"], check=True, capture_output=True, text=True
    ).stdout
    found = re.search(r"release ([\d.]+)", text)
    return found.group(1) if found else text.strip()
