"""What changed between two figures of a kernel, in sentences.

Worse: more registers by more than 8 and 5 %; bytes spilled where none were, or more by more than 16
and 5 %; any more shared memory; more loads, stores, atomics or barriers by more than 2 and 5 %; and
any change of matrix instructions, of copies through the tensor memory accelerator or, beyond 2 and
5 %, of asynchronous copies, since those say which way of computing the compiler took. The same in
the good direction is an improvement. The tolerances let small edits pass, and ptxas vary: it
allocates registers differently from run to run for a few kernels (of CUDA 12.8, one spilled 168 or
172 bytes from the same PTX).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

Figures = dict[str, int]

REGISTERS_OF_A_MULTIPROCESSOR = 65536
# Most that registers and counts may rise, as (number, fraction): the larger of the two.
REGISTER_TOLERANCE = (8, 0.05)
COUNT_TOLERANCE = (2, 0.05)
SPILL_TOLERANCE = (16, 0.05)
COSTS = {
    "global_loads": "global loads",
    "global_stores": "global stores",
    "atomics": "atomic operations",
    "barriers": "barriers",
}
WAYS = {
    "tma_loads": "loads through the tensor memory accelerator",
    "tma_stores": "stores through the tensor memory accelerator",
}


@dataclass(frozen=True)
class Change:
    """One difference.

    Attributes:
        worse: Whether the gate fails for it.
        text: End of a sentence that starts with the kernel.
    """

    worse: bool
    text: str


def compare(before: Figures, after: Figures) -> Iterator[Change]:
    """Every difference that counts, the most telling first."""
    yield from _spills(before, after)
    yield from _matrix(before, after)
    yield from _registers(before, after)
    yield from _shared(before, after)
    yield from _ways(before, after)
    for name, words in COSTS.items():
        old, new = before.get(name, 0), after.get(name, 0)
        if _beyond(old, new, COUNT_TOLERANCE):
            yield Change(new > old, f"has {new} {words} in its code, {old} before")


def _beyond(old: int, new: int, tolerance: tuple[int, float]) -> bool:
    number, fraction = tolerance
    return abs(new - old) > max(number, fraction * old)


def _spills(before: Figures, after: Figures) -> Iterator[Change]:
    names = ("spill_store_bytes", "spill_load_bytes")
    old, new = ([figures.get(name, 0) for name in names] for figures in (before, after))
    changed = [_spill_changed(then, now) for then, now in zip(old, new, strict=True)]
    if not any(changed):
        return
    text = f"spills {new[0]} bytes a thread and reads {new[1]} back, {old[0]} and {old[1]} before"
    if any(now > then and each for now, then, each in zip(new, old, changed, strict=True)):
        yield Change(True, f"{text}: it loses time wherever that happens in a loop")
    else:
        yield Change(False, text)


def _registers(before: Figures, after: Figures) -> Iterator[Change]:
    old, new = before.get("registers", 0), after.get("registers", 0)
    if not _beyond(old, new, REGISTER_TOLERANCE):
        return
    fit_old, fit_new = _programs(before), _programs(after)
    fit = f"{fit_new} programs of {after['warps']} warps fit a multiprocessor"
    fit += f", {fit_old} before" if fit_old != fit_new else ", as before"
    yield Change(new > old, f"takes {new} registers a thread, {old} before: {fit}")


def _programs(figures: Figures) -> int:
    """Programs per multiprocessor as far as registers go."""
    threads = 32 * figures.get("warps", 4)
    return REGISTERS_OF_A_MULTIPROCESSOR // max(1, threads * figures.get("registers", 0))


def _shared(before: Figures, after: Figures) -> Iterator[Change]:
    old, new = before.get("shared_bytes", 0), after.get("shared_bytes", 0)
    if new != old:
        text = f"takes {new} bytes of shared memory, {old} before"
        if new > old:
            text += ": fewer programs may fit a multiprocessor"
        yield Change(new > old, text)


def _spill_changed(old: int, new: int) -> bool:
    return (old == 0) != (new == 0) or _beyond(old, new, SPILL_TOLERANCE)


def _matrix(before: Figures, after: Figures) -> Iterator[Change]:
    """Instructions of the matrix units: machine code if it differs, PTX only otherwise."""
    names = sorted(name for name in before.keys() | after.keys() if name.endswith(("mma", "mfma")))
    changed = [name for name in names if before.get(name, 0) != after.get(name, 0)]
    machine = [name for name in changed if not name.startswith("ptx_")]
    for name in machine or changed:
        old, new = before.get(name, 0), after.get(name, 0)
        if new < old:
            why = "products are gone, or no longer run there"
        else:
            why = "products were added or cut into smaller ones"
        label = name.removeprefix("ptx_").removesuffix("_mma").upper()
        yield Change(True, f"has {new} {label} matrix instructions, {old} before: {why}")


def _ways(before: Figures, after: Figures) -> Iterator[Change]:
    for name, words in WAYS.items():
        old, new = before.get(name, 0), after.get(name, 0)
        if old != new:
            yield Change(True, f"has {new} {words}, {old} before")
    old, new = before.get("async_copies", 0), after.get("async_copies", 0)
    if _beyond(old, new, COUNT_TOLERANCE):
        why = "fewer loads run ahead of their use" if new < old else "more is copied"
        yield Change(True, f"has {new} asynchronous copies, {old} before: {why}")
