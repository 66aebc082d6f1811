"""Intervals as they are printed: a share, or a difference of two, cannot leave its range.

The t interval knows nothing of that. Verdicts rest on it as it is; only the print is clipped.
"""

from __future__ import annotations

from dataclasses import dataclass

from ham.claims.config import Test

SHARE = "share"


@dataclass(frozen=True)
class Printed:
    """The ends of an interval, whether they were clipped, and whether they rule anything out."""

    low: float
    high: float
    clipped: bool = False
    informative: bool = True


def possible(test: Test) -> tuple[float, float] | None:
    """What the effect of a test can be at all; None where no range is known."""
    if test.delta.unit != SHARE:
        return None
    if test.test == "threshold":
        return -test.delta.value, 1 - test.delta.value
    # A step less its part of the whole gain: each lies between -1 and 1.
    end = 1 + (test.largest_step or 0.0)
    return -end, end


def printed(test: Test, low: float, high: float) -> Printed:
    """An interval as far as it is possible."""
    within = possible(test)
    if within is None:
        return Printed(low, high)
    ends = max(low, within[0]), min(high, within[1])
    return Printed(*ends, clipped=ends != (low, high), informative=ends != within)
