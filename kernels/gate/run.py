"""One run of the gate: list the cases, compile, compare, and say what is wrong."""

from __future__ import annotations

import importlib.util
import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ham.kernels
from ham.errors import DeviceError
from ham.files import read_json
from ham.kernels.gate.compare import Figures, compare
from ham.kernels.gate.pool import WorkerPool
from ham.kernels.gate.snapshot import (
    FOLDER,
    Entry,
    Snapshot,
    read_snapshot,
    snapshot_path,
    write_snapshot,
)
from ham.kernels.gate.targets import TARGETS, GateTarget, over_limits, starved
from ham.progress import ProgressReporter

KNOWN_FAILURES = Path(__file__).parent / "known_failures.json"
MOST_LAUNCHES = 60
HINTS = {
    "parent layout must have at least rank": (
        "Triton 3.6.0 and 3.7.1 cannot place the sum of a vector that is itself a sum of a matrix "
        "product on Blackwell: sum the matrix at once, tl.sum(x), or the vector as a row, "
        "tl.sum(v[None, :], 1)"
    )
}


@dataclass
class GateResult:
    """What a run found; sentences throughout.

    Attributes:
        triton: Version of Triton.
        cases: All cases as the worker lists them.
        figures: Of everything compiled.
        failures: For each of them the gate fails.
        notices: Good or harmless news.
        compilations: How many kernels were compiled, equal ones once.
    """

    triton: str
    cases: list[dict[str, Any]]
    figures: dict[Entry, Figures] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    compilations: int = 0


@dataclass(frozen=True)
class _Plan:
    """What to compile: for every key of a compilation, the entries that it stands for."""

    entries: dict[str, list[Entry]]
    requests: dict[str, dict[str, Any]]


def case_modules() -> tuple[str, ...]:
    """Modules with compile cases, one per operation that has Triton kernels."""
    names = [
        f"ham.kernels.{module.name}.compile_cases"
        for module in pkgutil.iter_modules(ham.kernels.__path__)
        if module.ispkg
    ]
    return tuple(name for name in names if importlib.util.find_spec(name) is not None)


def run_gate(
    targets: Sequence[GateTarget] = tuple(TARGETS.values()),
    *,
    everything: bool = False,
    update: bool = False,
    jobs: int = 2,
) -> GateResult:
    """Compile the kernels of all operations, then `judge` them.

    Args:
        targets: What to compile for.
        everything: Every case on every target. Default: the default cases, and on targets whose
            instructions are not counted each kernel once.
        update: Write what was compiled into the snapshot instead of comparing.
        jobs: Number of processes.
    """
    result = compile_cases(case_modules(), targets, everything=everything, jobs=jobs)
    judge(result, FOLDER, update=update)
    return result


def compile_cases(
    modules: Sequence[str],
    targets: Sequence[GateTarget],
    *,
    everything: bool = False,
    jobs: int = 2,
    path: Sequence[Path] = (),
) -> GateResult:
    """Compile the cases of `modules`, which are looked for in the folders of `path` first.

    Raises:
        DeviceError: If the cases cannot be listed, e.g. because Triton cannot be imported.
    """
    names = [target.name for target in targets]
    with WorkerPool(modules, jobs, path) as pool:
        listed = pool.ask({"do": "list", "targets": names, "everything": everything})
        if "error" in listed:
            raise DeviceError(f"the gate cannot list its cases: {listed['error']}")
        result = GateResult(listed["triton"], listed["cases"])
        for case in result.cases:
            if "error" in case:
                result.failures.append(f"{case['operation']}, {case['name']} {case['error']}")
        _compile(pool, _make_plan(result.cases, everything), result)
    if not everything:
        _check_size(result)
    return result


def judge(result: GateResult, folder: Path, *, update: bool = False) -> None:
    """Add to a result what exceeds the limits, and what changed since the snapshot in `folder`."""
    _check_limits(result)
    path = snapshot_path(result.triton, folder)
    before = read_snapshot(path)
    gone = [] if before is None else list(_vanished(before, result))
    if update:
        kept = {entry: before[entry] for entry in (before or {}) if entry not in gone}
        write_snapshot(path, result.triton, {**kept, **result.figures})
        result.notices.append(f"wrote {path}")
    elif before is None:
        result.notices.append(
            f"no snapshot for Triton {result.triton}: everything was compiled and checked against "
            "the limits, but compared with nothing; `ham kernels gate --update` stores one"
        )
    else:
        _compare(before, result, gone)


def _make_plan(cases: Sequence[dict[str, Any]], everything: bool) -> _Plan:
    plan = _Plan({}, {})
    seen: set[tuple[str, str, str]] = set()
    for case in cases:
        for target, launches in case["launches"].items():
            count: dict[str, int] = {}
            for index, (kernel, key) in enumerate(launches):
                count[kernel] = count.get(kernel, 0) + 1
                once = (case["operation"], kernel, target)
                if not (everything or TARGETS[target].counted or once not in seen):
                    continue
                seen.add(once)
                label = kernel if count[kernel] == 1 else f"{kernel} #{count[kernel]}"
                entry = Entry(case["operation"], case["name"], target, label)
                plan.entries.setdefault(key, []).append(entry)
                request = {"do": "compile", "operation": case["operation"], "name": case["name"]}
                plan.requests.setdefault(key, {**request, "target": target, "index": index})
    return plan


def _compile(pool: WorkerPool, plan: _Plan, result: GateResult) -> None:
    keys = {_identity(request): key for key, request in plan.requests.items()}
    known = read_json(KNOWN_FAILURES)
    result.compilations = len(keys)
    with ProgressReporter("kernels gate", len(keys)) as progress:
        for request, reply in pool.ask_all(list(plan.requests.values())):
            entries = plan.entries[keys[_identity(request)]]
            first = entries[0]
            name = f"{first.operation} {first.kernel} {first.target}"
            progress.advance(note=f"{first.kernel} {first.target}")
            if "figures" in reply:
                result.figures.update(dict.fromkeys(entries, reply["figures"]))
                if name in known:
                    result.notices.append(
                        f"{_subject(entries)} compiles, though {KNOWN_FAILURES.name} says that it "
                        "does not: take it off that list"
                    )
            elif name in known:
                result.notices.append(f"{_subject(entries)} does not compile: {known[name]}")
            else:
                hints = [hint for text, hint in HINTS.items() if text in reply["error"]]
                why = "; ".join([reply["error"], *hints])
                result.failures.append(f"{_subject(entries)} does not compile: {why}")


def _identity(request: dict[str, Any]) -> tuple:
    return tuple(request[name] for name in ("operation", "name", "target", "index"))


def _subject(entries: Sequence[Entry]) -> str:
    """`ssd, walk K128 w4 s2 and 2 more cases on sm_90: scan_kernel`."""
    cases = list(dict.fromkeys(entry.case for entry in entries))
    more = f" and {len(cases) - 1} more" if len(cases) > 1 else ""
    first = entries[0]
    return f"{first.operation}, {cases[0]}{more} on {first.target}: {first.kernel}"


def _check_size(result: GateResult) -> None:
    """More than the time of the default set allows is said, not forbidden."""
    keys: dict[str, set[str]] = {}
    for case in result.cases:
        for target, launches in case["launches"].items():
            keys.setdefault(target, set()).update(key for _, key in launches)
    most = max((len(each) for each in keys.values()), default=0)
    if most > MOST_LAUNCHES:
        result.notices.append(
            f"the default set has {most} kernels, more than {MOST_LAUNCHES}: give some cases "
            "default=False"
        )


def _check_limits(result: GateResult) -> None:
    for entries, problem in _grouped(
        (entry, problem)
        for entry, figures in sorted(result.figures.items())
        for problem in over_limits(figures, TARGETS[entry.target])
    ):
        result.failures.append(f"{_subject(entries)} {problem}")
    for entries, figures in _grouped(
        (entry, (figures["spill_store_bytes"], figures["registers"]))
        for entry, figures in sorted(result.figures.items())
        if starved(figures)
    ):
        spilled, registers = figures
        result.notices.append(
            f"{_subject(entries)} spills {spilled} bytes a thread with only {registers} registers "
            "in use: ptxas gave up too early, a launch with maxnreg=255 makes it use all"
        )


def _vanished(before: Snapshot, result: GateResult) -> Iterator[Entry]:
    """Entries of cases that are no longer listed, or of kernels that their case launches no more.

    A case that was only listed, or that failed, says nothing about its kernels.
    """
    listed = {(case["operation"], case["name"]) for case in result.cases}
    tried = {entry[:3] for entry in result.figures if TARGETS[entry.target].counted}
    for entry in before:
        missing = entry not in result.figures and entry[:3] in tried
        if entry[:2] not in listed or missing:
            yield entry


def _compare(before: Snapshot, result: GateResult, gone: Sequence[Entry]) -> None:
    changes = (
        (entry, change)
        for entry, figures in sorted(result.figures.items())
        if entry in before
        for change in compare(before[entry], figures)
    )
    better = False
    for entries, change in _grouped(changes):
        better |= not change.worse
        kind = result.failures if change.worse else result.notices
        kind.append(f"{_subject(entries)} {change.text}")
    new = [entry for entry in sorted(result.figures) if entry not in before]
    for entries, _ in _grouped((entry, None) for entry in new):
        result.notices.append(f"{_subject(entries)} is not in the snapshot")
    for entries, _ in _grouped((entry, None) for entry in sorted(gone)):
        result.notices.append(f"{_subject(entries)} is in the snapshot, but no longer launched")
    if better or new or gone:
        result.notices.append("store the new state: the same command with --update")


def _grouped(pairs: Iterator[tuple[Entry, Any]]) -> Iterator[tuple[list[Entry], Any]]:
    """Entries of one kernel about which the same is said, so that it is said once."""
    groups: dict[tuple, list[Entry]] = {}
    for entry, about in pairs:
        groups.setdefault((entry.operation, entry.target, entry.kernel, about), []).append(entry)
    for (*_, about), entries in groups.items():
        yield entries, about
