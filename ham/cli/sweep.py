"""`ham sweep`: decoding, prefill and training over context, batch and routed share."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ham.cli._options import add_continue_options
from ham.device import DEVICES

if TYPE_CHECKING:
    import torch

    from ham.measure.sweep.grid import Cell, Scale


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parsers of `ham sweep run`, `ham sweep list` and `ham sweep report`."""
    parser = subparsers.add_parser(
        "sweep", help="decode, prefill and training speed over context, batch and routed share"
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    measure = actions.add_parser("run", help="measure what FILE lacks, the most important first")
    _add_choice(measure)
    measure.add_argument(
        "--rows", type=Path, required=True, metavar="FILE", help="JSON-lines file to continue"
    )
    measure.add_argument(
        "--budget-seconds", type=float, metavar="S", help="begin no cell after this many seconds"
    )
    add_continue_options(measure)
    measure.add_argument(
        "--no-fuse",
        action="store_true",
        help="leave small operations to torch (default: fused by torch.compile on a GPU)",
    )
    measure.set_defaults(handler=run)
    listing = actions.add_parser("list", help="print the cells in order, with predicted bytes")
    _add_choice(listing)
    listing.set_defaults(handler=show)
    report = actions.add_parser("report", help="tables and figures from rows of a sweep")
    report.add_argument("rows", type=Path, nargs="+", metavar="ROWS", help="JSON-lines files")
    report.add_argument("--out", type=Path, required=True, help="folder to write")
    report.set_defaults(handler=write_report)


def _add_choice(parser: argparse.ArgumentParser) -> None:
    """The options that say which cells."""
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--experiments", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--models", nargs="+", metavar="MIXER", help="default: all")
    parser.add_argument("--contexts", nargs="+", type=int, metavar="T", help="tokens")
    parser.add_argument("--batches", nargs="+", type=int, metavar="B", help="sequences")
    parser.add_argument("--fractions", nargs="+", type=float, metavar="F", help="routed shares")
    parser.add_argument("--quick", action="store_true", help="only the cells of the targets")


def run(arguments: argparse.Namespace) -> int:
    """Measure cell by cell; status 0 even where cells failed, since those are rows."""
    from ham.device import gpu_lease, resolve_device
    from ham.errors import ConfigError
    from ham.locks import sole_writer

    budget = arguments.budget_seconds
    if budget is not None and not budget > 0:
        raise ConfigError(f"--budget-seconds must be above 0, not {budget:g}")
    with sole_writer(arguments.rows), gpu_lease(arguments.device):
        return measure_on(arguments, resolve_device(arguments.device))


def measure_on(arguments: argparse.Namespace, device: torch.device, **ceiling_sizes: int) -> int:
    """Measure on a device; `ceiling_sizes` are further arguments of `measure_ceilings`."""
    import torch

    from ham.measure.sweep.record import sweep_fingerprint, sweep_manifest
    from ham.measure.sweep.run import Sweep
    from ham.measure.sweep.store import SweepStore

    started = time.monotonic()
    scale, cells = _choose(arguments, device)
    # Half precision is slow on most CPUs and nothing there is compared with a GPU.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    code = sweep_fingerprint()
    store = SweepStore.of_run(
        arguments.rows,
        sweep_manifest(device, dtype, scale, sys.argv, code),
        code,
        sys.argv,
        overwrite=arguments.overwrite,
        retry_errors=arguments.retry_errors,
    )
    sweep = Sweep(
        device,
        dtype,
        scale,
        store,
        budget_seconds=arguments.budget_seconds,
        fuse=device.type == "cuda" and not arguments.no_fuse,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    try:
        left = sweep.run(cells, **ceiling_sizes)
    finally:
        store.finish(time.monotonic() - started)
    rows = store.all_rows()
    failed = sum(row.error is not None for row in rows)
    print(f"{len(rows)} rows in {arguments.rows}, {failed} failed; {left} cells left")
    return 0


def show(arguments: argparse.Namespace) -> int:
    """Print the cells and what they need, without a GPU."""
    import torch

    from ham.device import uses_gpu
    from ham.measure.sweep.budget import predicted_bytes
    from ham.measure.sweep.models import ModelShelf
    from ham.report.formats import byte_size

    kind = "cuda" if uses_gpu(arguments.device) else "cpu"
    scale, cells = _choose(arguments, torch.device(kind))
    shelf = ModelShelf(scale, torch.device("meta"), torch.bfloat16)
    size = 2 if kind == "cuda" else 4
    for cell in cells:
        needed = predicted_bytes(cell, scale, size, shelf.parameters(cell.model))
        print(f"{byte_size(needed):>10}  {cell.name}")
    print(f"{len(cells)} cells")
    return 0


def _choose(arguments: argparse.Namespace, device: torch.device) -> tuple[Scale, list[Cell]]:
    """Full size on a GPU, toy size elsewhere."""
    from ham.measure.sweep.grid import FULL, SMOKE, Choice, choose_cells

    scale = FULL if device.type == "cuda" else SMOKE
    choice = Choice(
        arguments.experiments,
        arguments.models,
        arguments.contexts,
        arguments.batches,
        arguments.fractions,
        arguments.quick,
    )
    return choose_cells(scale, choice)


def write_report(arguments: argparse.Namespace) -> int:
    """Write tables, figures and the comparison with the targets."""
    from ham.cli.report import find_manifests
    from ham.report.rows import read_rows
    from ham.report.sweep_report import build_sweep_report

    rows = read_rows(arguments.rows)
    listing = build_sweep_report(rows, arguments.out, find_manifests(arguments.rows, []))
    print(arguments.out / listing["files"][0])
    return 0
