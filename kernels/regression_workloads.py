"""What the speed regression suite times: operations at fixed sizes, and the control beside them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ham.kernels.convolved_heads.cases import ConvolvedHeadsCase
from ham.kernels.gated_delta_rule.cases import GatedDeltaRuleCase
from ham.kernels.gated_sum.cases import GatedSumCase
from ham.kernels.registry import Operation, find_operation
from ham.kernels.routed_attention.cases import RoutedAttentionCase
from ham.kernels.ssd.cases import SsdCase
from ham.kernels.verify import SEED, Case, Comparison, compare, name_outputs, verify_cases

# Changing a size makes the stored baselines of that operation useless.
SIZES: Mapping[str, Mapping[str, Case]] = {
    "cpu": {
        "convolved_heads": ConvolvedHeadsCase(4, 1024, 4, 64, 64),
        "gated_sum": GatedSumCase(4, 1024, 4, 64),
        "gated_delta_rule": GatedDeltaRuleCase(4, 1024, 4, 64, 64),
        "routed_attention": RoutedAttentionCase(4, 1024, 4, 64, 64),
        "ssd": SsdCase(4, 1024, 4, 64, 64),
    },
    "cuda": {
        "convolved_heads": ConvolvedHeadsCase(8, 4096, 16, 64, 64),
        "gated_sum": GatedSumCase(8, 4096, 16, 64),
        "gated_delta_rule": GatedDeltaRuleCase(8, 4096, 16, 128, 128),
        "routed_attention": RoutedAttentionCase(8, 4096, 16, 128, 128),
        "ssd": SsdCase(8, 4096, 32, 64, 128),
    },
}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
PROVIDERS = {"cpu": ("torch",), "cuda": ("triton",)}
MODES = ("forward", "forward_backward")
# Side of the square matrices and bytes copied. On an H100 at its peaks of 989 TFLOP/s and 3.35 TB/s
# that is 0.14 + 0.16 ms.
CONTROL = {"cpu": (768, 16 << 20), "cuda": (4096, 256 << 20)}
CHUNK = 64

Action = Callable[[], object]


def make_control(device: torch.device) -> Action:
    """A product of square matrices and a copy: arithmetic and memory in one workload."""
    size, copied = CONTROL[device.type]
    options = {"device": device, "dtype": DTYPES[device.type]}
    a, b = torch.ones(size, size, **options), torch.ones(size, size, **options)
    product = torch.empty(size, size, **options)
    source = torch.ones(copied, dtype=torch.int8, device=device)
    target = torch.empty_like(source)

    def control() -> None:
        torch.mm(a, b, out=product)
        target.copy_(source)

    return control


def check_case(name: str, device_type: str) -> Case:
    """The verification case on which a provider is compared before it is timed.

    On a CPU the longest. On a GPU, where the truth step by step is slow, the shortest that is
    longer than a chunk and has what the timed size has (a rotation, no initial state, ...).
    """
    cases = verify_cases(name)
    if device_type == "cpu":
        return max(cases, key=lambda case: case.time)
    wanted = _features(SIZES[device_type][name])
    alike = [case for case in cases if case.time > CHUNK and _features(case) == wanted]
    return min(alike, key=lambda case: case.time)


def _features(case: Case) -> dict[str, object]:
    """What is not a number: switches, kinds of gates, lengths of sequences."""
    return {
        name: value
        for name, value in asdict(case).items()
        if isinstance(value, bool) or not isinstance(value, int | float)
    }


@lru_cache
def checked(name: str, provider: str, device: torch.device) -> Comparison:
    """A provider compared with the reference, once for all modes."""
    case = check_case(name, device.type)
    return compare(find_operation(name), provider, case, torch.float32, device)


@lru_cache(maxsize=1)
def timed_inputs(name: str, device: torch.device) -> dict[str, Any]:
    """Inputs at the size of this device, shared by the modes of an operation.

    Values for a GPU are those of the first sequence, repeated there: drawing all of them on the
    host, in float64 so that devices agree, took longer than everything that is timed.
    """
    case = SIZES[device.type][name]
    if device.type == "cpu":
        return case.inputs(DTYPES[device.type], device, SEED)
    one = replace(case, batch=1).inputs(DTYPES[device.type], device, SEED)
    return {name: _repeated(name, value, case.batch) for name, value in one.items()}


def _repeated(name: str, value: Any, batch: int) -> Any:
    """A tensor whose name says that its first axis is B, that many times; others as they are."""
    if isinstance(value, Tensor) and name.rpartition("_")[2].startswith("B"):
        return value.repeat(batch, *[1] * (value.ndim - 1))
    return value


def make_call(operation: Operation, provider: str, mode: str, device: torch.device) -> Action:
    """One call of a provider at the size of this device."""
    inputs = timed_inputs(operation.name, device)
    leaves = {
        name: value.detach().requires_grad_(mode != "forward")
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    arguments: dict[str, Any] = {**inputs, **leaves, "provider": provider}

    def forward() -> list[Tensor]:
        return list(name_outputs(operation.run(**arguments)).values())

    if mode == "forward":
        return torch.no_grad()(forward)
    with torch.no_grad():
        weights = [torch.ones_like(output) for output in forward()]

    def both() -> None:
        torch.autograd.grad(forward(), list(leaves.values()), weights)

    return both


class Stopwatch:
    """Times an action: by events on a GPU, by the wall clock on a CPU.

    On a GPU the call returns after the second event, so that an outer clock sees the work too.

    Attributes:
        times_ms: One per call.
    """

    def __init__(self, action: Action, device: torch.device):
        self.action = action
        self.times_ms: list[float] = []
        self._cuda = device.type == "cuda"

    def __call__(self) -> None:
        """Run the action once and keep its time."""
        if not self._cuda:
            start = time.perf_counter()
            self.action()
            self.times_ms.append((time.perf_counter() - start) * 1e3)
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self.action()
        end.record()
        end.synchronize()
        self.times_ms.append(start.elapsed_time(end))
