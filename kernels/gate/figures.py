"""Registers, spills, shared memory and instruction counts of a compiled kernel.

Everything is read from the machine code, with the `cuobjdump` that comes with Triton. Bytes spilled
are the widths of all local stores and loads. That is what `ptxas -v` prints, but it is in the code
itself, so it is known for a kernel out of Triton's cache too: over 26 kernels the bytes stored were
the same, and the bytes loaded differed once, by one word in 64.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton

from ham.kernels.gate.targets import GateTarget

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
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
PORTABLE = {"ptx": {"tcgen05_mma": r"tcgen05\.mma"}, "amdgcn": {"mfma": r"\bv_mfma"}}


def figures_of(compiled: Any, target: GateTarget) -> dict[str, int]:
    """Figures of a kernel that Triton compiled; counts of 0 are left out."""
    metadata = compiled.metadata
    figures = {"warps": metadata.num_warps, "shared_bytes": metadata.shared}
    if target.counted:
        return figures | count_ptx(compiled.asm["ptx"]) | count_sass(_disassemble(compiled.asm))
    columns = getattr(metadata, "tmem_size", None)
    if columns:
        figures["tensor_memory_columns"] = columns
    for kind, patterns in PORTABLE.items():
        text = compiled.asm.get(kind) or ""
        figures |= {name: n for name, p in patterns.items() if (n := len(re.findall(p, text)))}
    return figures


def count_ptx(text: str) -> dict[str, int]:
    """Matrix instructions in PTX."""
    counts = {
        "ptx_wgmma": len(re.findall(r"^\s*(?:@\S+\s+)?wgmma\.mma_async", text, re.M)),
        "ptx_mma": len(re.findall(r"^\s*(?:@\S+\s+)?mma\.sync", text, re.M)),
    }
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


def _disassemble(asm: Any) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", "--dump-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
