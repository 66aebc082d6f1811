"""What one rule found, and the judge that keeps the worst of many comparisons."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

AXES = {"B": "sequence", "T": "token", "D": "channel", "V": "logit"}


@dataclass(frozen=True)
class Finding:
    """The result of one rule.

    Attributes:
        rule: Its name.
        passed: None where it was not judged; the message then says why.
        measured: The worst figure; the rule is kept while it is at most `limit`.
        limit: The largest legal figure.
        unit: What the figures count.
        message: Where it failed: which tensor, which token, how far. Empty when passed.
        seconds: How long the rule took.
    """

    rule: str
    passed: bool | None
    measured: float = math.nan
    limit: float = math.nan
    unit: str = ""
    message: str = ""
    seconds: float = 0.0


def not_judged(reason: str) -> Finding:
    """A finding without a verdict, which says why there is none."""
    return Finding("", None, message=reason)


class Judge:
    """Keeps the worst figure and where it was measured.

    Args:
        limit: Largest legal figure.
        unit: What it counts. Tensors are compared by |found - expected| / (1 + |expected|).
    """

    def __init__(self, limit: float = 0.0, unit: str = "relative"):
        self.limit = limit
        self.unit = unit
        self.measured = 0.0
        self.message = ""

    def same(
        self, what: str, found: Tensor, expected: Tensor, axes: str = "", first_token: int = 0
    ) -> None:
        """Compare two tensors; a shape, dtype or number that is not there is infinitely far.

        Args:
            what: Names the tensor in messages.
            found: What the mixer computed.
            expected: What it should have computed.
            axes: One letter of `AXES` per axis; a plain index where empty.
            first_token: Number of the first token along axis T.
        """
        if found.shape != expected.shape or found.dtype != expected.dtype:
            self.fail(
                f"{what}: {tuple(found.shape)} {found.dtype} where "
                f"{tuple(expected.shape)} {expected.dtype} is expected"
            )
            return
        if not found.numel():
            return
        found, expected = found.detach().double(), expected.detach().double()
        far = (found - expected).abs() / (1 + expected.abs())
        far = far.masked_fill(found == expected, 0.0).nan_to_num(math.inf, math.inf)
        worst = float(far.max())
        place = [int(i) for i in torch.unravel_index(far.argmax().cpu(), far.shape)]
        self.figure(
            worst,
            f"{what} at {_describe(place, axes, first_token)}: {float(found[tuple(place)]):.9g} "
            f"where {float(expected[tuple(place)]):.9g} is expected",
        )

    def figure(self, value: float, message: str) -> None:
        """One more figure; the worst and its message are kept."""
        value = math.inf if math.isnan(value) else value
        if value > self.measured:
            self.measured = value
            self.message = f"{message} ({value:.3g} {self.unit}, limit {self.limit:g})"

    def fault(self, message: str) -> None:
        """Count one more fault; the first is reported."""
        self.message = self.message or message
        self.measured += 1

    def fail(self, message: str) -> None:
        """Something that no figure describes."""
        if not math.isinf(self.measured):
            self.measured, self.message = math.inf, message

    def finding(self) -> Finding:
        """The verdict; the runner fills in the rule's name and the time."""
        passed = self.measured <= self.limit
        message = "" if passed else self.message
        return Finding("", passed, self.measured, self.limit, self.unit, message)


def _describe(place: list[int], axes: str, first_token: int) -> str:
    if not axes:
        return f"index {place}"
    return ", ".join(
        f"{AXES[axis]} {index + (first_token if axis == 'T' else 0)}"
        for axis, index in zip(axes, place, strict=True)
    )
