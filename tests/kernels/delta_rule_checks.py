"""What the tests of the Triton gated delta rule share: devices, errors against float64.

Without a GPU the kernels run in Triton's interpreter, in float32.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from triton_device import DEVICE

from ham.kernels.gated_delta_rule import gated_delta_rule
from ham.kernels.gated_delta_rule.cases import GatedDeltaRuleCase as Case

OUTPUTS = ("o", "final_state", "prediction")
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def without_gluon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the plain kernels do what those for Hopper would."""
    from ham.kernels.gated_delta_rule import triton_backward, triton_tiles

    for module in (triton_tiles, triton_backward):
        monkeypatch.setattr(module, "use_gluon", lambda *args: False)


@pytest.fixture
def plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    without_gluon(monkeypatch)


def make_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    inputs = case.inputs(dtype, DEVICE, seed)
    return {name: value for name, value in inputs.items() if torch.is_tensor(value)}


def outputs_and_gradients(
    inputs: dict[str, torch.Tensor], provider: str, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """All outputs, and all gradients of their sum weighted with fixed random numbers."""
    leaves = {
        name: value.clone().requires_grad_(value.is_floating_point())
        for name, value in inputs.items()
    }
    output = gated_delta_rule(**leaves, provider=provider)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(part.shape, generator=generator).to(DEVICE, dtype) for part in output]
    torch.autograd.backward(output, [w.to(o.dtype) for w, o in zip(weights, output, strict=True)])
    gradients = {
        f"d{name.rsplit('_', 1)[0]}": leaf.grad
        for name, leaf in leaves.items()
        if leaf.requires_grad
    }
    return dict(zip(OUTPUTS, (part.detach() for part in output), strict=True)) | gradients


def worst(errors: dict[str, float]) -> float:
    """The largest error; NaN counts as infinite, and all are printed should a test fail."""
    print({name: f"{error:.1e}" for name, error in errors.items()})
    return max(math.inf if math.isnan(error) else error for error in errors.values())


def relative_errors(case: Case, dtype: torch.dtype, seed: int = 0) -> dict[str, float]:
    """Errors on the inputs of a case."""
    return errors_on(make_inputs(case, dtype, seed), dtype)


def errors_on(inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, float]:
    """Norm of the difference to float64 over the norm, 0/0 counted as 0."""
    wide = {
        name: value.double() if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    expected = outputs_and_gradients(wide, "torch", dtype)
    received = outputs_and_gradients(inputs, "triton", dtype)
    assert received.keys() == expected.keys()
    errors = {}
    for name, value in expected.items():
        difference = (received[name].double() - value).norm().item()
        errors[name] = difference / value.norm().item() if difference else 0.0
    return errors
