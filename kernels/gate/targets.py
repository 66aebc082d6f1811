"""The GPUs that the gate compiles for, with what fits on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ham.errors import unknown_choice
from ham.kernels.triton_target import A100, H100, Target

KIB = 1024


@dataclass(frozen=True)
class GateTarget:
    """A compilation target.

    Attributes:
        name: As users write it, e.g. `sm_90`.
        backend, arch, warp_size: As `triton.backends.compiler.GPUTarget` takes them.
        stand_in: What launchers are told about the device.
        shared_limit: Largest shared memory of one program in bytes.
        counted: Instructions are counted and compared. For the others it matters that every kernel
            compiles and fits.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    stand_in: Target
    shared_limit: int
    counted: bool = False


# Shared memory that a program may ask for: CUDA C++ Programming Guide, "Technical Specifications
# per Compute Capability", and the LDS size in AMD's CDNA 3 instruction set manual. MI300 is cut for
# like an A100: it has none of the hardware that launchers use from capability 9.0 on.
TARGETS = {
    target.name: target
    for target in (
        GateTarget("sm_90", "cuda", 90, 32, H100, 227 * KIB, counted=True),
        GateTarget("sm_80", "cuda", 80, 32, A100, 163 * KIB, counted=True),
        GateTarget("sm_100", "cuda", 100, 32, Target((10, 0), 148), 227 * KIB),
        GateTarget("gfx942", "hip", "gfx942", 64, Target((8, 0), 304), 64 * KIB),
    )
}
TENSOR_MEMORY_COLUMNS = 512


def parse_targets(text: str | None) -> tuple[GateTarget, ...]:
    """Targets from a list with commas; all of them for None.

    Raises:
        ConfigError: If one is unknown.
    """
    if text is None:
        return tuple(TARGETS.values())
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names or [text]:
        if name not in TARGETS:
            raise unknown_choice("target", name, TARGETS)
    return tuple(TARGETS[name] for name in dict.fromkeys(names))


def over_limits(figures: dict[str, int], target: GateTarget) -> Sequence[str]:
    """What does not fit on the target, as ends of sentences that start with the kernel."""
    problems = []
    shared = figures.get("shared_bytes", 0)
    if shared > target.shared_limit:
        problems.append(
            f"takes {shared} bytes of shared memory, {target.name} has {target.shared_limit}: "
            "it cannot be launched there"
        )
    columns = figures.get("tensor_memory_columns", 0)
    if columns > TENSOR_MEMORY_COLUMNS:
        problems.append(
            f"takes {columns} columns of tensor memory, {target.name} has "
            f"{TENSOR_MEMORY_COLUMNS}: it cannot be launched there"
        )
    return problems


def starved(figures: dict[str, int]) -> bool:
    """Whether ptxas spilled a lot though most registers were free, as that of CUDA 12.8 does.

    For sm_80 it gave a walk of the gated delta rule 32 registers and spilled 6220 bytes; the same
    PTX with `.maxnreg 255`, which only forbids more, got 255 and spilled 1052.
    """
    return figures.get("spill_store_bytes", 0) > 1024 and figures.get("registers", 255) < 128
