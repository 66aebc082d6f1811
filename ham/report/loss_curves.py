"""How far two loss curves of one training run, computed in two ways, lie apart.

Both curves have a loss in nats for each optimiser step, from the same weights and batches.
"""

from __future__ import annotations

from collections.abc import Sequence

from ham.report.statistics import mean

WINDOW = 20
"""Steps of the running mean: single batches differ more from each other than runs do."""


def smoothed(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """Means of every `window` values in a row; the first is that of the first `window` values.

    A sequence shorter than the window gives its one mean.
    """
    width = min(window, len(values))
    return (
        [mean(values[end - width : end]) for end in range(width, len(values) + 1)] if width else []
    )


def absolute_differences(losses: Sequence[float], base: Sequence[float]) -> list[float]:
    """Step by step."""
    return [abs(one - other) for one, other in zip(losses, base, strict=True)]


def last_half_difference(losses: Sequence[float], base: Sequence[float]) -> float:
    """Mean absolute difference over the last half of the steps."""
    differences = absolute_differences(losses, base)
    return mean(differences[len(differences) // 2 :])


def largest_smoothed_difference(losses: Sequence[float], base: Sequence[float]) -> float:
    """Largest absolute difference between the running means."""
    return max(absolute_differences(smoothed(losses), smoothed(base)))


def final_loss(losses: Sequence[float]) -> float:
    """Mean of the last `WINDOW` steps."""
    return mean(losses[-WINDOW:])
