"""`ham kernels bench` on a GPU, and `ham kernels report`."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ham.cli._options import add_continue_options

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16")


def add_bench_options(parser: argparse.ArgumentParser) -> None:
    """The options of `ham kernels bench`."""
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    _add_choice(parser)
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="JSON-lines file to write, with a manifest"
    )
    add_continue_options(parser)
    parser.add_argument(
        "--time-wrong-peer",
        action="store_true",
        help="time providers whose result is wrong, and peers that refuse, marked as such",
    )


def _add_choice(parser: argparse.ArgumentParser) -> None:
    """The options that say which problems and providers."""
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the inputs (default: bfloat16 on a GPU, else float32)"
    )
    parser.add_argument("--ops", nargs="+", metavar="OP", help="operations (default: all)")
    parser.add_argument(
        "--providers", nargs="+", metavar="NAME", help="providers (default: all but the reference)"
    )
    parser.add_argument(
        "--shapes", nargs="+", metavar="SHAPE", help="e.g. B8_T4096_H16_D128 (GPU only)"
    )
    parser.add_argument(
        "--fractions", nargs="+", type=float, metavar="F", help="routed shares (GPU only)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one shape of each operation, a quarter routed"
    )


def register_precompile(actions: argparse._SubParsersAction) -> None:
    """Add the parser of `ham kernels precompile`."""
    parser = actions.add_parser(
        "precompile", help="compile what a speed run needs, in processes side by side"
    )
    _add_choice(parser)
    parser.add_argument("--jobs", type=int, default=8, help="processes (default: %(default)s)")
    parser.set_defaults(handler=precompile)


def precompile(arguments: argparse.Namespace) -> int:
    """Compile, and say what took how long; status 0 even if a peer failed."""
    import torch

    from ham.errors import ConfigError
    from ham.kernels.speed.precompile import jobs_of
    from ham.kernels.speed.precompile import precompile as run
    from ham.kernels.speed.problems import choose_problems
    from ham.kernels.speed.subjects import check_names

    if arguments.jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, not {arguments.jobs}")
    check_names(arguments.providers)
    problems = choose_problems(
        arguments.ops, arguments.shapes, arguments.quick, arguments.fractions
    )
    dtype = arguments.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    jobs = jobs_of(problems, arguments.providers)
    print(f"{len(jobs)} processes, {arguments.jobs} at a time", file=sys.stderr, flush=True)
    for done in run(jobs, dtype, arguments.jobs):
        outcome = done.error or "ready"
        print(
            f"{done.seconds:6.1f} s  {done.operation} {done.shape} {done.provider}: {outcome}",
            flush=True,
        )
    return 0


def register_report(actions: argparse._SubParsersAction) -> None:
    """Add the parser of `ham kernels report`."""
    parser = actions.add_parser("report", help="tables and figures from rows of a speed run")
    parser.add_argument("rows", type=Path, nargs="+", metavar="ROWS", help="JSON-lines files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.set_defaults(handler=report)


def run_bench(arguments: argparse.Namespace, device: torch.device, **ceiling_sizes: int) -> int:
    """Compare and time on a device; status 1 if a provider of this project is wrong.

    `ceiling_sizes` are further arguments of `measure_ceilings`.
    """
    import torch

    from ham.kernels.speed.problems import choose_problems
    from ham.kernels.speed.record import kernel_fingerprint, speed_manifest
    from ham.kernels.speed.run import Bench
    from ham.kernels.speed.store import SpeedStore
    from ham.kernels.speed.subjects import check_names

    started = time.monotonic()
    check_names(arguments.providers)
    problems = choose_problems(
        arguments.ops, arguments.shapes, arguments.quick, arguments.fractions
    )
    dtype = arguments.dtype or "bfloat16"
    code = kernel_fingerprint()
    store = SpeedStore.of_run(
        arguments.rows,
        speed_manifest(device.type, dtype, sys.argv, code),
        code,
        sys.argv,
        overwrite=arguments.overwrite,
        retry_errors=arguments.retry_errors,
    )
    bench = Bench(
        device,
        getattr(torch, dtype),
        store,
        providers=arguments.providers,
        time_wrong=arguments.time_wrong_peer,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    try:
        ceilings = bench.ceilings(**ceiling_sizes)
        for problem in problems:
            bench.run(problem, ceilings)
    finally:
        store.finish(time.monotonic() - started, bench.tiles)
    return _print_result(store.all_rows())


def _print_result(rows: list) -> int:
    from ham.kernels.registry import operations
    from ham.report.kernel_tables import speed_tables
    from ham.report.table_format import markdown_grid

    for table in speed_tables(rows):
        print(f"\n{table.title}\n")
        print("\n".join(markdown_grid(table)))
    own = {
        (operation.name, provider.name)
        for operation in operations().values()
        for provider in operation.providers.values()
        if provider.kind != "peer"
    }
    wrong = {
        (row.model, row.provider, row.task)
        for row in rows
        if row.correct is False and (row.model, row.provider) in own
    }
    for operation, provider, shape in sorted(wrong):
        print(f"ham: {operation} by {provider} is wrong on {shape}", file=sys.stderr)
    return 1 if wrong else 0


def report(arguments: argparse.Namespace) -> int:
    """Write tables, figures and the comparison with the targets."""
    from ham.cli.report import find_manifests
    from ham.report.kernel_report import build_kernel_report
    from ham.report.rows import read_rows

    rows = read_rows(arguments.rows)
    listing = build_kernel_report(rows, arguments.out, find_manifests(arguments.rows, []))
    print(arguments.out / listing["files"][0])
    return 0
