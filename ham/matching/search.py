"""The value of a knob whose cost comes closest to what is wanted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

EXHAUSTIVE = 64
"""Up to so many values all are tried; then what they cost need not grow from one to the next."""

INTERPOLATIONS = 4
"""Steps along the straight line before an interval is halved: costs that are not linear need it."""


@dataclass(frozen=True)
class Refusal:
    """Why a value cannot be used."""

    reason: str


@dataclass(frozen=True)
class Found:
    """What a search ended with.

    Attributes:
        index: Of the closest value; None where every value tried was refused.
        cost: What it costs.
        limit: What stands between it and the cost wanted.
    """

    index: int | None
    cost: float | None
    limit: str


Cost = Callable[[Any], float | Refusal]
"""What a value costs, or why it cannot be used."""


def closest(values: Sequence[Any], cost: Cost, wanted: float, start: int = 0) -> Found:
    """Find the value whose cost is nearest to `wanted`; of equally near ones the first.

    More than `EXHAUSTIVE` values must cost more from one to the next, or the same, and those that
    are refused must lie below or above all others.

    Args:
        values: What may be tried, in order; at least one.
        cost: What a value costs, or why it is refused.
        wanted: The cost to come close to.
        start: Index of the value to begin with; 0 is tried in its place where that is refused.
    """
    tried = _Tried(values, cost)
    if len(values) <= EXHAUSTIVE:
        for index in range(len(values)):
            tried[index]
    else:
        _bracket(tried, wanted, start)
    return _nearest(tried, wanted)


class _Tried(dict[int, float | Refusal]):
    """Costs by index, computed when first asked for."""

    def __init__(self, values: Sequence[Any], cost: Cost):
        super().__init__()
        self.values_tried, self.cost = values, cost

    def __missing__(self, index: int) -> float | Refusal:
        self[index] = self.cost(self.values_tried[index])
        return self[index]

    def refused(self, index: int) -> bool:
        """Whether a value cannot be used."""
        return isinstance(self[index], Refusal)


def _bracket(tried: _Tried, wanted: float, start: int) -> None:
    """Try values until two neighbours stand on either side of what is wanted."""
    if tried.refused(start):
        start = 0
    if tried.refused(start) or tried[start] == wanted:
        return
    upward = tried[start] < wanted
    end = len(tried.values_tried) - 1 if upward else 0

    def passed(index: int) -> bool:
        """Whether a value lies on the other side of what is wanted, or is refused."""
        return tried.refused(index) or (tried[index] >= wanted) == upward

    near, stride = start, 1
    far = _moved(near, stride, end)
    while far != end and not passed(far):
        # Most costs are linear: then this is the last leap.
        line = abs(_on_the_line(tried, near, far, wanted) - far) + 1
        near, stride = far, max(2 * stride, line)
        far = _moved(near, stride, end)
    if not passed(far):
        return
    for turn in itertools.count():
        low, high = sorted((near, far))
        if high - low < 2:
            return
        middle = (low + high) // 2
        if turn < INTERPOLATIONS:
            middle = min(max(_on_the_line(tried, near, far, wanted), low + 1), high - 1)
        near, far = (near, middle) if passed(middle) else (middle, far)


def _moved(index: int, stride: int, end: int) -> int:
    """`index` moved towards `end` by `stride`, not beyond it."""
    return min(index + stride, end) if end >= index else max(index - stride, end)


def _on_the_line(tried: _Tried, one: int, other: int, wanted: float) -> int:
    """The index where the line through two costs meets `wanted`; halfway where it does not."""
    if tried.refused(one) or tried.refused(other) or tried[one] == tried[other]:
        return (one + other) // 2
    slope = (tried[other] - tried[one]) / (other - one)
    return one + math.floor((wanted - tried[one]) / slope)


def _nearest(tried: _Tried, wanted: float) -> Found:
    costs = {index: cost for index, cost in tried.items() if not isinstance(cost, Refusal)}
    refusals = {index: cost for index, cost in tried.items() if isinstance(cost, Refusal)}
    if not costs:
        return Found(None, None, refusals[min(refusals)].reason)
    best = min(costs, key=lambda index: (abs(costs[index] - wanted), index))
    short = costs[best] < wanted
    beyond = {i: cost for i, cost in costs.items() if (cost > wanted if short else cost < wanted)}
    if beyond:
        other = min(beyond, key=lambda index: abs(beyond[index] - wanted))
        limit = f"the next one, {tried.values_tried[other]}, gives {beyond[other]:,.0f}"
    elif refusals:
        near = min(refusals, key=lambda index: abs(index - best))
        limit = f"{tried.values_tried[near]} is refused: {refusals[near].reason}"
    else:
        limit = f"no value gives {'more' if short else 'less'}"
    return Found(best, costs[best], limit)
