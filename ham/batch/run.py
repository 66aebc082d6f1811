"""Runs jobs one after the other in this process, each as its own `ham` command would.

A job that fails is reported and those that need its result are left out; the others go on. What is
done stays done: a batch that was killed goes on with the job that it was at, and that job, if it
trains, from its last checkpoint. What torch compiled for an arm is used by the next seeds of that
arm and dropped before another arm, so that no arm depends on which ones came before it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ham.batch.keys import forget_readers, is_done, mark_done
from ham.batch.tasks import Task, Tasks
from ham.errors import DeviceError
from ham.files import write_json
from ham.progress import ProgressReporter

INTERRUPTED = 130
PEAK_OF_PROCESS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"


@dataclass
class Outcome:
    """What became of the jobs, by name.

    Attributes:
        ran: Done now.
        kept: Done before, by the same code, configuration and data.
        failed: Name and reason; the log says more.
        left_out: Not tried, because a job that they need failed.
    """

    ran: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def run_tasks(tasks: Tasks, chosen: Sequence[Task]) -> Outcome:
    """Do the chosen jobs that are not done yet.

    Raises:
        DeviceError: If a job leaves the GPU unusable for this process; repeat the command.
        SystemExit: If a signal ended a job.
    """
    outcome = Outcome()
    unusable: set[Task] = set()
    arm = None
    with ProgressReporter("batch", len(chosen)) as progress:
        for task in chosen:
            if unusable & set(tasks.needs(task)):
                unusable.add(task)
                outcome.left_out.append(task.name)
            elif is_done(tasks, task):
                outcome.kept.append(task.name)
            else:
                _start_job(new_arm=task.arm != arm)
                arm = task.arm
                forget_readers(tasks, task)
                reason = _run_one(tasks, task)
                if reason is None:
                    mark_done(tasks, task)
                    outcome.ran.append(task.name)
                else:
                    unusable.add(task)
                    outcome.failed[task.name] = reason
                    print(f"ham: {task.name} failed: {reason}", file=sys.stderr, flush=True)
                    _require_working_gpu(task)
            progress.advance(note=task.name)
    return outcome


def write_outcome(path: Path, outcome: Outcome) -> None:
    """Write the names of the jobs that are done, for Snakemake."""
    write_json(path, {"jobs": sorted([*outcome.ran, *outcome.kept])})


def _run_one(tasks: Tasks, task: Task) -> str | None:
    """Run the command of a job with its output in its log; why it failed, or None."""
    from ham.cli import main

    log = Path(tasks.log(task))
    command = tasks.command(task)
    try:
        with _output_to(log), _as_command(command):
            status = main(command)
    except Exception as error:
        with log.open("a", encoding="utf-8") as handle:
            traceback.print_exception(error, file=handle)
        return " ".join(f"{type(error).__name__}: {error} (see {log})".split())
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    return None if status == 0 else f"{_last_line(log)} (see {log})"


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Send what this process and its libraries print to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    with log.open("w", buffering=1, encoding="utf-8") as handle:
        os.dup2(handle.fileno(), 1)
        os.dup2(handle.fileno(), 2)
        try:
            with contextlib.redirect_stdout(handle), contextlib.redirect_stderr(handle):
                yield
        finally:
            for number, descriptor in enumerate(kept, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)


@contextlib.contextmanager
def _as_command(command: Sequence[str]) -> Iterator[None]:
    """Let manifests record the command that does this job alone."""
    before = sys.argv
    sys.argv = [before[0], *command]
    try:
        yield
    finally:
        sys.argv = before


def _start_job(new_arm: bool) -> None:
    """Free what the job before has left, so that peaks and compilations are this job's own."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None:
        if new_arm:
            torch.compiler.reset()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        PEAK_OF_PROCESS.write_text(RESET_PEAK)


def _require_working_gpu(task: Task) -> None:
    """An illegal access leaves a process in which every later job fails too."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        raise DeviceError(
            f"{task.name} left the GPU unusable ({str(error).splitlines()[0]}); repeat the "
            "command: finished jobs are kept"
        ) from error


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8").splitlines() if line.strip()]
    return lines[-1].removeprefix("ham: error: ") if lines else "no output"
