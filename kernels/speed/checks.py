"""Comparison of a subject with the truth, on the tensors that are timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ham.kernels.speed import routing_parts
from ham.kernels.speed.problems import COMPONENTS, Inputs, Problem
from ham.kernels.speed.subjects import Subject
from ham.kernels.speed.truth import Truth, short_name
from ham.kernels.verify import TOLERANCES, error_measure
from ham.routing import upper_quantile

SCORE_ERROR = 0.005
DECISIONS_FLIPPED = 0.01
DECISION_FRACTION = 0.25
BACKWARD = "forward_backward"


@dataclass(frozen=True)
class Check:
    """How far a subject is from the truth.

    Attributes:
        tolerance: Largest relative error accepted.
        outputs, gradients: Relative error by tensor.
        score_error: Mean absolute error of the score in bfloat16 runs.
        decisions_flipped: Share of tokens that the score's minimum over heads routes differently
            at a routed fraction of a quarter, with the true threshold.
        failure: Why there are no outputs.
        refusal: Why there are no gradients though there are outputs.
    """

    tolerance: float
    outputs: Mapping[str, float] = field(default_factory=dict)
    gradients: Mapping[str, float] = field(default_factory=dict)
    score_error: float | None = None
    decisions_flipped: float | None = None
    failure: str | None = None
    refusal: str | None = None

    def worst(self, mode: str = BACKWARD) -> tuple[str, float] | None:
        """Tensor with the largest error and that error; NaN counts as the largest.

        Only outputs count for modes without a backward.
        """
        errors = self.errors(mode)
        if not errors:
            return None
        name = max(errors, key=lambda one: float("inf") if _is_nan(errors[one]) else errors[one])
        return name, errors[name]

    def errors(self, mode: str = BACKWARD) -> dict[str, float]:
        """Errors of the tensors that a mode makes."""
        return {**self.outputs, **(self.gradients if mode == BACKWARD else {})}

    def faults(self, mode: str = BACKWARD) -> list[str]:
        """What is wrong with the tensors that a mode makes, in words; empty if all are right."""
        found = [
            f"{name} off by {error:.1e}, accepted {self.tolerance:.0e}"
            for name, error in self.errors(mode).items()
            if not error <= self.tolerance
        ]
        if self.score_error is not None and not self.score_error <= SCORE_ERROR:
            found.append(f"score off by {self.score_error:.1e}, accepted {SCORE_ERROR}")
        if self.decisions_flipped is not None and not self.decisions_flipped <= DECISIONS_FLIPPED:
            found.append(
                f"{self.decisions_flipped:.1%} of decisions flipped, "
                f"accepted {DECISIONS_FLIPPED:.0%}"
            )
        return found


def _is_nan(number: float) -> bool:
    return number != number


def make_leaves(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, the floating ones as leaves that ask for a gradient."""
    return {
        name: value.detach().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in tensors.items()
    }


def describe(error: BaseException) -> str:
    """An exception in one line: its first, and the next where that only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return f"{type(error).__name__}: {told}"[:300]


def check_subject(
    subject: Subject, problem: Problem, inputs: Inputs, weight: Tensor | None, truth: Truth
) -> Check:
    """Run a subject forward and backward and compare everything it gives with the truth."""
    dtype = next(value.dtype for value in inputs.values() if value.is_floating_point())
    tolerance = TOLERANCES[dtype]
    if problem.operation in COMPONENTS:
        return _check_part(subject, inputs, truth, tolerance)
    leaves = make_leaves(inputs)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    try:
        with subject.setting():
            outputs = subject.call(leaves)
            _wait(inputs)
    except Exception as error:
        return Check(tolerance, failure=describe(error))
    made = {name: value.detach() for name, value in outputs.items()}
    found = _compare(made, truth.outputs, dtype)
    refusal, gradients = None, {}
    try:
        with subject.setting():
            read_out = next(iter(outputs.values()))
            gradients = torch.autograd.grad(
                read_out, list(wanted.values()), weight, materialize_grads=True
            )
            _wait(inputs)
    except Exception as error:
        refusal = describe(error)
    named = {f"d {short_name(name)}": g for name, g in zip(wanted, gradients, strict=False)}
    return Check(
        tolerance,
        found.errors,
        _compare(named, truth.gradients, dtype).errors,
        found.score_error,
        found.decisions_flipped,
        refusal=refusal,
    )


def _wait(inputs: Inputs) -> None:
    """Let a failure on the device show up where it was caused."""
    if next(iter(inputs.values())).is_cuda:
        torch.cuda.synchronize()


@dataclass(frozen=True)
class _Found:
    errors: dict[str, float]
    score_error: float | None = None
    decisions_flipped: float | None = None


def _compare(made: Mapping[str, Tensor], truth: Mapping[str, Tensor], dtype: torch.dtype) -> _Found:
    """Errors of the tensors that a subject gives; scores in bfloat16 have measures of their own."""
    measure = error_measure(dtype)
    score_error = flipped = None
    errors = {}
    for name, value in made.items():
        if name not in truth:
            continue
        if name == "score" and dtype == torch.bfloat16:
            difference = value.double() - truth[name].double()
            score_error = difference.abs().mean().item()
            flipped = decisions_flipped(value, truth[name])
        else:
            errors[name] = measure(value, truth[name])
    return _Found(errors, score_error, flipped)


def decisions_flipped(score_BTH: Tensor, truth_BTH: Tensor) -> float:
    """Share of tokens routed differently: minimum over heads against the true threshold."""
    score_BT, truth_BT = score_BTH.float().amin(-1), truth_BTH.float().amin(-1)
    threshold = upper_quantile(truth_BT, DECISION_FRACTION)
    return ((score_BT >= threshold) != (truth_BT >= threshold)).double().mean().item()


def _check_part(subject: Subject, inputs: Inputs, truth: Truth, tolerance: float) -> Check:
    try:
        found = subject.call(inputs)
        _wait(inputs)
    except Exception as error:
        return Check(tolerance, failure=describe(error))
    different = routing_parts.mismatch(found, truth.outputs)
    if different is not None:
        return Check(tolerance, failure=f"wrong: {different}")
    return Check(tolerance, {name: 0.0 for name in truth.outputs})
