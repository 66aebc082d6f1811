"""Registers, spills, shared memory and instruction counts of a compiled kernel.

Everything is read from the machine code, with the `cuobjdump` that comes with Triton. Bytes spilled
are the widths of all local stores and loads, so they are known for a kernel out of Triton's cache
too. They may differ from what another run of `ptxas -v` prints: of 28 kernels that spill, 26 agreed
and two differed by one or two words, as ptxas differs from itself between runs.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ham.kernels.gate.targets import GateTarget

INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)((?:\.\w+)*)", re.M
)
USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
LOCAL_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
COUNTED = {
    "global_loads": ("LDG",),
    "global_stores": ("STG",),
    "async_copies": ("LDGSTS",),
    "tma_loads": ("UTMALDG",),
    "tma_stores": ("UTMASTG", "UTMAREDG"),
    "atomics": ("ATOM", "ATOMG", "RED", "REDG"),
    "barriers": ("BAR",),
}
MATRIX = {
    "ptx": {
        "ptx_wgmma": r"wgmma\.mma_async",
        "ptx_mma": r"\bmma\.sync",
        "ptx_tcgen05_mma": r"tcgen05\.mma\.",
    },
    "amdgcn": {"mfma": r"\bv_mfma"},
}


def figures_of(compiled: Any, target: GateTarget) -> dict[str, int]:
    """Figures of a kernel that Triton compiled; counts of 0 are left out."""
    metadata = compiled.metadata
    figures = {"warps": metadata.num_warps, "shared_bytes": metadata.shared}
    if columns := getattr(metadata, "tmem_size", None):
        figures["tensor_memory_columns"] = columns
    for kind, patterns in MATRIX.items():
        figures |= count_text(compiled.asm.get(kind) or "", patterns)
    if target.counted:
        figures |= count_sass(_disassemble(compiled.asm["cubin"]))
    return figures


def count_text(text: str, patterns: dict[str, str]) -> dict[str, int]:
    """How often each pattern occurs in assembly; what does not occur is left out."""
    counts = {name: len(re.findall(pattern, text)) for name, pattern in patterns.items()}
    return {name: count for name, count in counts.items() if count}


def count_sass(text: str) -> dict[str, int]:
    """Registers, stack, spills and instructions out of what `cuobjdump` printed."""
    usage = [(int(registers), int(stack)) for registers, stack in USAGE.findall(text)]
    opcodes: Counter[str] = Counter()
    local: Counter[str] = Counter()
    for opcode, modifiers in INSTRUCTION.findall(text):
        opcodes[opcode] += 1
        if opcode in ("LDL", "STL"):
            widths = [LOCAL_BYTES[part] for part in modifiers.split(".") if part in LOCAL_BYTES]
            local[opcode] += widths[0] if widths else 4
    counts = {name: sum(opcodes[each] for each in group) for name, group in COUNTED.items()}
    counts |= {name.lower(): n for name, n in opcodes.items() if name.endswith("MMA")}
    return {
        "registers": max(registers for registers, _ in usage),
        "stack_bytes": max(stack for _, stack in usage),
        "spill_store_bytes": local["STL"],
        "spill_load_bytes": local["LDL"],
        **{name: count for name, count in counts.items() if count},
    }


def tool(name: str) -> Path:
    """A program that comes with Triton, found without importing Triton."""
    return Path(find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / name


def _disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool("cuobjdump")), "--dump-resource-usage", "--dump-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
