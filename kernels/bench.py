"""Speed of the providers, each verified before it is timed.

Method. A provider is first compared with the reference on the very inputs that are timed, outputs
and every gradient (`ham.kernels.verify`); one that fails is reported with its error and not timed.
Then forward (without autograd) and forward plus backward (gradients of all floating inputs) are
timed by wall clock after one warm-up, the providers of a case taking turns, so that a busy moment
of the machine hits all of them. Reported is the median with the 20th and 80th percentile. Making
inputs, weights of the loss and gradient buffers of earlier rounds lie outside the timed region.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ham.kernels.registry import Operation, operations
from ham.kernels.verify import SEED, Case, Comparison, compare, name_outputs, speed_cases
from ham.report.statistics import Estimate, p20_p80

MIN_ROUNDS = 5
MAX_ROUNDS = 25
BUDGET_SECONDS = 3.0

Task = Callable[[], float]


@dataclass(frozen=True)
class Timing:
    """Speed of one provider on one case; without times if it failed verification.

    Attributes:
        comparison: The verification on the same inputs.
        forward_ms, forward_backward_ms: Medians with p20 and p80, or None.
        flops: Of one forward pass of the algorithm.
    """

    case: Case
    comparison: Comparison
    flops: int
    forward_ms: Estimate | None = None
    forward_backward_ms: Estimate | None = None


def _milliseconds(action: Callable[[], Any]) -> float:
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1e3


def _tasks(operation: Operation, provider: str, inputs: Mapping[str, Any]) -> tuple[Task, Task]:
    """Two functions that run one forward, or one forward and backward, and return its time."""
    leaves = {
        name: value.clone().requires_grad_()
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    arguments = {**inputs, **leaves, "provider": provider}
    with torch.no_grad():
        outputs = list(name_outputs(operation.run(**arguments)).values())
    weights = [torch.ones_like(output) for output in outputs]

    def forward() -> float:
        with torch.no_grad():
            return _milliseconds(lambda: operation.run(**arguments))

    def both() -> None:
        results = list(name_outputs(operation.run(**arguments)).values())
        torch.autograd.grad(results, list(leaves.values()), weights)

    return forward, lambda: _milliseconds(both)


def _take_turns(tasks: list[Task]) -> list[list[float]]:
    for task in tasks:
        task()
    samples: list[list[float]] = [[] for _ in tasks]
    deadline = time.perf_counter() + BUDGET_SECONDS * len(tasks)
    while len(samples[0]) < MAX_ROUNDS and (
        len(samples[0]) < MIN_ROUNDS or time.perf_counter() < deadline
    ):
        for task, times in zip(tasks, samples, strict=True):
            times.append(task())
    return samples


def time_case(
    operation: Operation,
    case: Case,
    dtype: torch.dtype,
    providers: Sequence[str] | None = None,
) -> Iterator[Timing]:
    """Verify, then time every provider of an operation that runs on the CPU and can do the case.

    Args:
        operation: The operation.
        case: The problem size.
        dtype: Of the inputs.
        providers: Names of those to time, or None for all.
    """
    device = torch.device("cpu")
    inputs = case.inputs(dtype, device, SEED)
    flops = case.cost(dtype).flops
    correct = []
    for provider in operation.providers.values():
        if not provider.available(device) or provider.refusal(inputs) is not None:
            continue
        if providers and provider.name not in providers:
            continue
        comparison = compare(operation, provider.name, case, dtype, device)
        if comparison.passed:
            correct.append(comparison)
        else:
            yield Timing(case, comparison, flops)
    tasks = [task for each in correct for task in _tasks(operation, each.provider, inputs)]
    samples = _take_turns(tasks)
    for comparison, forward, both in zip(correct, samples[::2], samples[1::2], strict=True):
        yield Timing(case, comparison, flops, p20_p80(forward), p20_p80(both))


def all_cases() -> list[tuple[Operation, Case]]:
    """Every operation with every case worth timing."""
    return [
        (operation, case)
        for operation in operations().values()
        for case in speed_cases(operation.name)
    ]
