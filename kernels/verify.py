"""Verification: every output and every gradient of a provider against the reference.

Method. Inputs are drawn in float64 with a fixed seed and rounded to the dtype under test. The
truth is the `reference` provider in float64 on exactly those rounded inputs. Outputs are weighted
with fixed random numbers and summed, which gives every output and every position an own weight in
the gradients. The error of a tensor is `max |x - truth| / max |truth|`; where the truth is zero
everywhere, it is `max |x|`.

Tolerances. float64: 1e-10, a hundred times the largest error over 25 seeds (1e-12, the decay rate
of Mamba-2 under strong decay) and far below what any wrong formula gives. float32: 1e-5, 84 units
in the last place: over the same seeds the largest error was 4e-6, for the loop as for the chunked
form, in the same tensor (a sum over all tokens that cancels); a smaller tolerance would depend on
the order in which a BLAS library adds.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ham.kernels.registry import REFERENCE, Cost, Operation, find_provider, operations

TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2}
SEED = 20260322


class Case(Protocol):
    """A problem size of one operation, as listed in its `cases.py`."""

    @property
    def name(self) -> str:
        """Readable and unique within the operation."""

    @property
    def time(self) -> int:
        """Sequence length T."""

    def cost(self, dtype: torch.dtype) -> Cost:
        """FLOPs and bytes of one forward pass."""

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int) -> dict[str, Any]:
        """Keyword arguments of the operation; equal seeds give equal values on every device."""


@dataclass(frozen=True)
class Comparison:
    """How far a provider is from the truth on one case.

    Attributes:
        errors: Relative error by tensor: outputs by name, gradients as `d <input>`.
        tolerance: Largest error accepted.
        refused: Why the provider cannot do this case; then there are no errors.
    """

    operation: str
    provider: str
    case: str
    dtype: torch.dtype
    errors: Mapping[str, float]
    tolerance: float
    refused: str | None = None

    @property
    def worst(self) -> float:
        """The largest error; NaN if any is NaN, 0 without any."""
        if not self.errors:
            return 0.0
        return torch.tensor(list(self.errors.values()), dtype=torch.float64).max().item()

    @property
    def passed(self) -> bool:
        """Whether every error is within the tolerance; NaN never is."""
        return all(error <= self.tolerance for error in self.errors.values())


def verify_cases(operation: str) -> tuple[Case, ...]:
    """Small cases that cover the corners; every provider must match on all of them."""
    return importlib.import_module(f"ham.kernels.{operation}.cases").VERIFY_CASES


def speed_cases(operation: str) -> tuple[Case, ...]:
    """Cases worth timing."""
    return importlib.import_module(f"ham.kernels.{operation}.cases").SPEED_CASES


def relative_error(value: Tensor, truth: Tensor) -> float:
    """`max |value - truth| / max |truth|`, or `max |value|` where the truth is all zero."""
    difference = (value.double() - truth.double()).abs().max().item()
    size = truth.double().abs().max().item()
    return difference / size if size > 0 else difference


def relative_norm(value: Tensor, truth: Tensor) -> float:
    """`||value - truth|| / ||truth||`, or `||value||` where the truth is all zero."""
    difference = (value.double() - truth.double()).norm().item()
    size = truth.double().norm().item()
    return difference / size if size > 0 else difference


def error_measure(dtype: torch.dtype) -> Callable[[Tensor, Tensor], float]:
    """How the error of a tensor is measured when inputs have this dtype."""
    return relative_norm if dtype == torch.bfloat16 else relative_error


def name_outputs(result: Any) -> dict[str, Tensor]:
    """Outputs of an operation by short name (`o`, `final_state`, ...), those that are given."""
    named = {"o": result} if isinstance(result, Tensor) else result._asdict()
    return {
        name.rpartition("_B")[0] or name: tensor
        for name, tensor in named.items()
        if tensor is not None
    }


def run_with_gradients(
    operation: Operation, provider: str, inputs: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Run forward and backward; returns outputs and the gradients of all floating inputs.

    The weights of the outputs are rounded to `dtype`, the one under test, so that the truth gets
    the same ones.
    """
    leaves = {
        name: value.detach().requires_grad_()
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    outputs = name_outputs(operation.run(**{**inputs, **leaves}, provider=provider))
    generator = torch.Generator().manual_seed(SEED)
    loss = torch.zeros((), dtype=torch.float64)
    for output in outputs.values():
        weight = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(dtype)
        loss = loss + (output * weight.to(output)).double().sum().cpu()
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    short = (f"d {name.rpartition('_')[0]}" for name in leaves)
    return {
        **{name: output.detach() for name, output in outputs.items()},
        **dict(zip(short, gradients, strict=True)),
    }


def compare(
    operation: Operation,
    provider: str,
    case: Case,
    dtype: torch.dtype,
    device: torch.device,
) -> Comparison:
    """Run a provider and the reference on one case.

    Raises:
        ConfigError: If the provider is unknown.
        DeviceError: If it cannot run on `device`.
    """
    chosen = find_provider(operation.name, provider, device)
    inputs = case.inputs(dtype, device, SEED)
    refused = chosen.refusal(inputs)
    if refused is not None:
        return Comparison(
            operation.name, provider, case.name, dtype, {}, TOLERANCES[dtype], refused
        )
    truth = run_with_gradients(operation, REFERENCE, exact_inputs(inputs), dtype)
    with chosen.setting():
        tried = run_with_gradients(operation, provider, inputs, dtype)
    measure = error_measure(dtype)
    errors = {name: measure(tried[name], truth[name]) for name in truth if name in tried}
    return Comparison(operation.name, provider, case.name, dtype, errors, TOLERANCES[dtype])


def exact_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs with every floating tensor in float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def error_formula(dtype: torch.dtype) -> str:
    """What `error_measure` computes, in writing."""
    if dtype == torch.bfloat16:
        return "||x - truth|| / ||truth||"
    return "max |x - truth| / max |truth|"


def verify_all(dtype: torch.dtype, device: torch.device) -> Iterator[Comparison]:
    """Compare every available provider of this project on every verification case.

    The reference itself is compared only below float64, where it shows how much of an error is
    rounding that nobody can avoid. Peers are compared where they are timed (`ham kernels bench`).
    """
    for operation in operations().values():
        for provider in operation.providers.values():
            if provider.kind == "peer" or not provider.available(device):
                continue
            if provider.name == REFERENCE and dtype == torch.float64:
                continue
            for case in verify_cases(operation.name):
                yield compare(operation, provider.name, case, dtype, device)
