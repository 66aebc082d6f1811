"""`ham kernels gate`: what the compiler makes of every kernel, without a GPU."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ham.kernels.gate.run import GateResult


def register(actions: argparse._SubParsersAction) -> None:
    """Add the parser of `ham kernels gate`."""
    parser = actions.add_parser(
        "gate", help="compile every kernel for GPUs that need not be here; compare with a snapshot"
    )
    parser.add_argument("--all", action="store_true", help="every case on every target")
    parser.add_argument("--update", action="store_true", help="store the figures as the snapshot")
    parser.add_argument("--targets", metavar="LIST", help="e.g. sm_90,sm_80; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="processes, default 2")
    parser.add_argument("--table", action="store_true", help="print the figures of every kernel")
    parser.set_defaults(handler=gate)


def gate(arguments: argparse.Namespace) -> int:
    """Print what was found; status 1 if a kernel got worse, fits nowhere or does not compile."""
    from ham.kernels.gate.targets import parse_targets

    targets = parse_targets(arguments.targets)
    if importlib.util.find_spec("triton") is None:
        print("kernels gate: not checked, Triton is not installed here")
        return 0
    from ham.kernels.gate.run import run_gate

    start = time.monotonic()
    result = run_gate(
        targets, everything=arguments.all, update=arguments.update, jobs=arguments.jobs
    )
    if arguments.table:
        print("\n".join(_table(result)), end="\n\n")
    print("\n".join(_summary(result)))
    for notice in result.notices:
        print(f"notice: {notice}")
    for failure in result.failures:
        print(f"ham: {failure}", file=sys.stderr)
    verdict = f"FAILED, {len(result.failures)} problems" if result.failures else "passed"
    seconds = time.monotonic() - start
    print(
        f"kernels gate: {verdict}; Triton {result.triton}, {result.compilations} compilations, "
        f"{seconds:.0f} s"
    )
    return 1 if result.failures else 0


def _summary(result: GateResult) -> Iterator[str]:
    """One line per operation and target, and each kernel that spills on Hopper."""
    groups: dict[tuple[str, str], list[dict[str, int]]] = {}
    for entry, figures in result.figures.items():
        groups.setdefault((entry.operation, entry.target), []).append(figures)
    for (operation, target), all_figures in sorted(groups.items()):
        line = f"{operation}, {target}: {len(all_figures)} kernels, shared memory up to "
        line += f"{max(figures['shared_bytes'] for figures in all_figures)} bytes"
        if "registers" in all_figures[0]:
            spilling = sum(figures["spill_store_bytes"] > 0 for figures in all_figures)
            most = max(figures["registers"] for figures in all_figures)
            line += f", registers up to {most}, {spilling} spill"
        yield line
    for entry, figures in sorted(result.figures.items()):
        if entry.target == "sm_90" and figures["spill_store_bytes"]:
            yield (
                f"spills on sm_90: {entry.operation}, {entry.case}: {entry.kernel}, "
                f"{figures['spill_store_bytes']} bytes a thread"
            )


def _table(result: GateResult) -> Iterator[str]:
    """All figures as a Markdown table; counts of zero stay empty."""
    rows = sorted(result.figures.items())
    names = sorted({name for _, figures in rows for name in figures})
    yield f"| {' | '.join(['operation', 'case', 'target', 'kernel', *names])} |"
    yield "| --- " * (len(names) + 4) + "|"
    for entry, figures in rows:
        cells = [*entry, *(str(figures.get(name, "")) for name in names)]
        yield f"| {' | '.join(cells)} |"
