"""Compile what a speed run will need, several processes side by side, before anything is timed.

On a fresh machine the compilers of our kernels, of FlexAttention and of the peers' libraries take
minutes one after the other (14 to 130 s a problem and provider on an H100 machine with 16 cores),
and each uses one core. Here every problem × provider runs once, forward and backward, in a process
of its own; what it compiles stays in the caches of Triton, torch and the peers, where the speed run
finds it. Tuning of peers that tune themselves is not kept: they do it again on a quiet machine.
"""

from __future__ import annotations

import concurrent.futures
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ham.kernels.speed.problems import Problem, make_problems
from ham.kernels.speed.subjects import Subject, choose_names, make_subject, refusal
from ham.kernels.verify import SEED

MODULE = "ham.kernels.speed.precompile"
SECONDS = 600.0


@dataclass(frozen=True)
class Compiled:
    """How one process ended.

    Attributes:
        operation, shape, provider: What it ran.
        seconds: How long it took, start of the process included.
        error: Last line that it wrote if it failed, or None.
    """

    operation: str
    shape: str
    provider: str
    seconds: float
    error: str | None


def jobs_of(problems: Sequence[Problem], providers: Sequence[str] | None) -> list[tuple[str, ...]]:
    """Operation, shape, fraction and provider of every process; one fraction is enough."""
    jobs: dict[tuple[str, str, str], tuple[str, ...]] = {}
    for problem in problems:
        fraction = _fraction(problem)
        for name in choose_names(problem, providers):
            job = (problem.operation, problem.shape, fraction, name)
            jobs.setdefault((problem.operation, problem.shape, name), job)
    return list(jobs.values())


def precompile(jobs: Sequence[tuple[str, ...]], dtype: str, processes: int) -> Iterator[Compiled]:
    """Run the jobs, `processes` at a time, and yield each as it ends; failures are reported."""
    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        running = [pool.submit(_in_a_process, job, dtype) for job in jobs]
        for future in concurrent.futures.as_completed(running):
            yield future.result()


def _in_a_process(job: tuple[str, ...], dtype: str) -> Compiled:
    operation, shape, _, provider = job
    start = time.monotonic()
    command = [sys.executable, "-m", MODULE, dtype, *job]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return Compiled(operation, shape, provider, SECONDS, "took too long")
    error = None
    if done.returncode:
        error = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return Compiled(operation, shape, provider, time.monotonic() - start, error)


def run_once(dtype: str, operation: str, shape: str, fraction: str, provider: str) -> None:
    """What a process does: one forward without gradients, one forward and backward.

    Raises:
        SystemExit: If the provider refuses the problem on this device.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    problem = _find_problem(operation, shape, fraction)
    inputs = problem.inputs(getattr(torch, dtype), device, SEED)
    subject = make_subject(problem, provider)
    reason = refusal(subject, problem, inputs)
    if reason is not None:
        raise SystemExit(f"skipped: {reason}")
    if subject.has_guard:
        subject = subject.without_guard()
    with subject.setting():
        with torch.no_grad():
            subject.call(inputs)
            prepared = subject.prepare(inputs)
        if problem.operation in ("route_index", "route_pack"):
            return
        _backward(subject, prepared)


def _find_problem(operation: str, shape: str, fraction: str) -> Problem:
    wanted = [float(fraction)] if fraction and float(fraction) < 1 else [0.25]
    problems = make_problems(operation, shape, wanted)
    return next(problem for problem in problems if _fraction(problem) == fraction)


def _fraction(problem: Problem) -> str:
    fraction = getattr(problem, "fraction", None)
    return "" if fraction is None else str(fraction)


def _backward(subject: Subject, prepared: dict) -> None:
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in prepared.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    read_out = next(iter(subject.timed({**prepared, **leaves}).values()))
    grads = torch.randn_like(read_out)
    torch.autograd.grad(read_out, list(leaves.values()), grads, allow_unused=True)


if __name__ == "__main__":
    run_once(*sys.argv[1:])
