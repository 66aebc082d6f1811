"""What the device reaches on the simplest work: copying, reading, one large matrix product.

Floors rest on these rates, measured in the same run, not on a data sheet. A kernel that only reads
can be faster than the copy rate, hence the third rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ham.kernels.registry import Cost
from ham.kernels.speed.clock import Task, make_clock, take_turns
from ham.kernels.speed.problems import Problem
from ham.report.statistics import Estimate

BUFFER_BYTES = 1 << 30
MATMUL_SIZE = 8192
COPY = "copy_gb_per_second"
READ = "read_gb_per_second"
MATMUL = "matmul_tflop_per_second"
RATES = (COPY, READ, MATMUL)


@dataclass(frozen=True)
class Ceilings:
    """Measured rates: bytes read and written a second when copying, FLOP/s of a bfloat16 matmul."""

    copy_bytes: float
    matmul_flops: float


def measure_ceilings(
    device: torch.device, buffer_bytes: int = BUFFER_BYTES, size: int = MATMUL_SIZE
) -> dict[str, Estimate]:
    """The three rates with their spread, by metric name."""
    source = torch.ones(buffer_bytes // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    no_setting = torch.no_grad
    timings = take_turns(
        make_clock(device),
        {
            COPY: Task(lambda: target.copy_(source), no_setting),
            READ: Task(source.sum, no_setting),
            MATMUL: Task(lambda: left @ right, no_setting),
        },
    )
    work = {COPY: 2 * buffer_bytes / 1e9, READ: buffer_bytes / 1e9, MATMUL: 2 * size**3 / 1e12}
    rates = {}
    for name, amount in work.items():
        estimate = timings[name].estimate
        if estimate is None:
            raise RuntimeError(f"{name} could not be measured: {timings[name].error}")
        rates[name] = _rate(amount, estimate)
    return rates


def _rate(amount: float, time: Estimate) -> Estimate:
    """`amount` per second; the fast end of the time is the high end of the rate."""
    seconds = [ms / 1e3 for ms in (time.value, time.high or time.value, time.low or time.value)]
    value, low, high = (amount / one for one in seconds)
    return Estimate(value, time.n, low, high, time.interval)


def ceilings_of(rates: dict[str, float]) -> Ceilings:
    """The two rates that floors rest on, in bytes and FLOPs a second."""
    return Ceilings(rates[COPY] * 1e9, rates[MATMUL] * 1e12)


@dataclass(frozen=True)
class Floor:
    """The least time: milliseconds, and whether `bytes` or `flops` set it."""

    milliseconds: float
    bound: str


def floor_of(problem: Problem, mode: str, dtype: torch.dtype, ceilings: Ceilings) -> Floor:
    """Floor of a mode of a problem.

    A forward that saves has the floor of one that does not. The backward counts `backward_flops`
    times the forward's FLOPs (2 for recurrences, 2.5 for attention, which computes its scores
    again), reads the inputs and the gradient of the read-out and writes as much gradient as there
    are inputs. Only bfloat16 products are held against the matmul rate.
    """
    forward = problem.cost(dtype)
    work = forward
    if mode == "forward_backward":
        output = problem.output_bytes(dtype)
        work = Cost(
            flops=round(forward.flops * (1 + problem.backward_flops)),
            bytes=forward.bytes + 2 * (forward.bytes - output) + output,
        )
    by_bytes = work.bytes / ceilings.copy_bytes * 1e3
    by_flops = work.flops / ceilings.matmul_flops * 1e3 if dtype == torch.bfloat16 else -math.inf
    return Floor(max(by_bytes, by_flops), "flops" if by_flops > by_bytes else "bytes")
