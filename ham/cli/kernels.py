"""`ham kernels`: are the providers of each operation right, and how fast are they?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ham.cli import _kernels_gate, _kernels_speed, _kernels_training
from ham.device import DEVICES
from ham.errors import ConfigError, unknown_choice

if TYPE_CHECKING:
    from ham.kernels.bench import Timing
    from ham.kernels.verify import Comparison
    from ham.report.rows import RowWriter

DTYPES = ("float32", "float64", "bfloat16")
MISSING = "–"


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add the parsers of every `ham kernels` command."""
    parser = subparsers.add_parser("kernels", help="verify and time the operations' providers")
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    check = actions.add_parser(
        "verify", help="compare outputs and every gradient with the float64 reference"
    )
    check.add_argument("--dtype", choices=DTYPES, default="float32")
    check.add_argument("--device", choices=DEVICES, default="auto")
    check.set_defaults(handler=verify)
    speed = actions.add_parser("bench", help="verify, then time, on the CPU or on a GPU")
    _kernels_speed.add_bench_options(speed)
    speed.set_defaults(handler=bench)
    _kernels_gate.register(actions)
    _kernels_speed.register_precompile(actions)
    _kernels_speed.register_report(actions)
    _kernels_training.register(actions)


def verify(arguments: argparse.Namespace) -> int:
    """Print one table per operation and a summary; status 1 if any provider is wrong."""
    import torch

    from ham.device import resolve_device
    from ham.kernels.verify import error_formula, verify_all

    dtype = getattr(torch, arguments.dtype)
    comparisons = list(verify_all(dtype, resolve_device(arguments.device)))
    for operation in dict.fromkeys(each.operation for each in comparisons):
        print(f"\n{operation}, {arguments.dtype}: {error_formula(dtype)}\n")
        print(_error_table([each for each in comparisons if each.operation == operation]))
    print(f"\nWorst over all cases, {arguments.dtype}\n")
    print(_summary_table(comparisons))
    return _report_failures(comparisons)


def bench(arguments: argparse.Namespace) -> int:
    """Print a table of times and write rows; status 1 if any provider is wrong."""
    from ham.device import gpu_lease, resolve_device

    with gpu_lease(arguments.device):
        device = resolve_device(arguments.device)
        if device.type == "cuda":
            return _kernels_speed.run_bench(arguments, device)
    return bench_cpu(arguments)


def bench_cpu(arguments: argparse.Namespace) -> int:
    """Verify and time on the CPU, in float32."""
    import torch

    from ham.kernels.bench import all_cases, time_case
    from ham.progress import ProgressReporter

    if arguments.dtype not in (None, "float32") or arguments.shapes:
        raise ConfigError("on a CPU providers are timed in float32 at the shapes of `cases.py`")
    timings: list[Timing] = []
    known = {operation.name for operation, _ in all_cases()}
    for name in set(arguments.ops or ()).difference(known):
        raise unknown_choice("operation", name, known)
    cases = [
        (operation, case)
        for operation, case in all_cases()
        if not arguments.ops or operation.name in arguments.ops
    ]
    with ProgressReporter("kernels bench", len(cases)) as progress:
        for operation, case in cases:
            timings += time_case(operation, case, torch.float32, arguments.providers)
            progress.advance(note=f"{operation.name} {case.name}")
    print(f"float32, {torch.get_num_threads()} threads, median [p20, p80] in ms\n")
    print(_time_table(timings))
    if arguments.rows is not None:
        _write_rows(arguments, timings)
    return _report_failures([timing.comparison for timing in timings])


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _error_table(comparisons: Sequence[Comparison]) -> str:
    names = list(dict.fromkeys(name for each in comparisons for name in each.errors))
    rows = [
        [
            each.provider,
            each.case,
            *(f"{each.errors[name]:.0e}" if name in each.errors else MISSING for name in names),
            _verdict(each),
        ]
        for each in comparisons
    ]
    return _markdown(["provider", "shape", *names, f"<= {comparisons[0].tolerance:.0e}"], rows)


def _verdict(comparison: Comparison) -> str:
    if comparison.refused is not None:
        return f"skipped: {comparison.refused}"
    return "yes" if comparison.passed else "NO"


def _summary_table(comparisons: Sequence[Comparison]) -> str:
    rows = []
    for key in dict.fromkeys((each.operation, each.provider) for each in comparisons):
        errors = [
            (name.startswith("d "), error)
            for each in comparisons
            if (each.operation, each.provider) == key
            for name, error in each.errors.items()
        ]
        worst = (
            max((e for is_gradient, e in errors if is_gradient is kind), default=0.0)
            for kind in (False, True)
        )
        rows.append([*key, *(f"{error:.1e}" for error in worst)])
    return _markdown(["operation", "provider", "outputs", "gradients"], rows)


def _time_table(timings: Sequence[Timing]) -> str:
    from ham.kernels.registry import REFERENCE

    base = {
        (each.comparison.operation, each.case.name): each.forward_backward_ms
        for each in timings
        if each.comparison.provider == REFERENCE
    }
    rows = []
    for each in timings:
        start = [each.comparison.operation, each.case.name, each.comparison.provider]
        if each.forward_ms is None or each.forward_backward_ms is None:
            rows.append([*start, *[MISSING] * 4, f"wrong: {each.comparison.worst:.1e}"])
            continue
        reference = base.get((each.comparison.operation, each.case.name))
        ratio = reference.value / each.forward_backward_ms.value if reference else None
        times = (
            f"{ms.value:.1f} [{ms.low:.1f}, {ms.high:.1f}]"
            for ms in (each.forward_ms, each.forward_backward_ms)
        )
        rows.append(
            [
                *start,
                *times,
                MISSING if ratio is None else f"{ratio:.1f}",
                f"{each.flops / each.forward_ms.value / 1e6:.1f}",
                f"{each.comparison.worst:.1e}",
            ]
        )
    header = ["operation", "shape", "provider", "forward", "forward + backward"]
    return _markdown([*header, "× reference", "GFLOP/s forward", "max error"], rows)


def _report_failures(comparisons: Iterable[Comparison]) -> int:
    failed = [each for each in comparisons if not each.passed]
    for each in failed:
        print(
            f"ham: {each.operation} by {each.provider} is wrong on {each.case}: "
            f"error {each.worst:.1e}, accepted {each.tolerance:.0e}",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _write_rows(arguments: argparse.Namespace, timings: Iterable[Timing]) -> None:
    import torch

    from ham.fingerprint import fingerprint
    from ham.report.manifest import (
        collect_manifest,
        device_name,
        manifest_path,
        write_manifest,
    )
    from ham.report.rows import RowWriter

    manifest = collect_manifest({"device": arguments.device}, sys.argv)
    code = fingerprint("ham.cli.kernels", "ham.kernels.bench")
    writer = RowWriter(
        device=device_name(arguments.device),
        code_fingerprint=code,
        manifest_id=manifest["manifest_id"],
    )
    for timing in timings:
        _add_rows(writer, timing, torch.get_num_threads())
    write_manifest(manifest_path(arguments.rows), manifest)
    writer.write(arguments.rows)


def _add_rows(writer: RowWriter, timing: Timing, threads: int) -> None:
    comparison = timing.comparison
    error = None
    if not comparison.passed:
        error = f"wrong result: error {comparison.worst:.1e}, accepted {comparison.tolerance:.0e}"
    for metric, ms in (
        ("forward_ms", timing.forward_ms),
        ("forward_backward_ms", timing.forward_backward_ms),
    ):
        spread = {} if ms is None else {"low": ms.low, "high": ms.high, "interval": ms.interval}
        writer.add(
            "kernel_speed",
            metric,
            None if ms is None else ms.value,
            model=comparison.operation,
            mixer=comparison.operation,
            task=timing.case.name,
            x_name="context",
            x_value=timing.case.time,
            labels={
                "dtype": str(comparison.dtype).removeprefix("torch."),
                "threads": threads,
                "max_relative_error": comparison.worst,
            },
            provider=comparison.provider,
            n=1 if ms is None else ms.n,
            error=error,
            **spread,
        )
