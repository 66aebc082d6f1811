"""Logarithmic axes of figures: ticks at measured values or round numbers, in words for readers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from ham.report.formats import short_bytes, short_rate, token_labels

# Tried in turn until a logarithmic axis has four ticks.
TICK_FACTORS = {
    2: ((1,), (1, 1.5), (1, 1.25, 1.5, 1.75)),
    10: ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7), tuple(1 + step / 4 for step in range(36))),
}


def log_x_ticks(axes: Axes, values: Sequence[float]) -> None:
    """A base-2 axis that names the measured values themselves, thinned where they are many."""
    axes.set_xscale("log", base=2)
    write = token_labels(values)
    width = axes.get_position().width * axes.get_figure().get_figwidth()
    # A digit is about 0.065 in wide at this size; a label and its gap must fit.
    fitting = width / (0.065 * max(len(write(value)) for value in values) + 0.09)
    step = math.ceil(len(values) / max(1, math.floor(fitting)))
    shown = sorted(values)[::-1][::step][::-1]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    if len(values) > 1:
        margin = (max(values) / min(values)) ** 0.04
        axes.set_xlim(min(values) / margin, max(values) * margin)


def log_y_bytes(axes: Axes) -> None:
    """A base-2 axis in KiB, MiB, GiB with at most seven ticks."""
    _log_y(axes, 2, lambda value, _: short_bytes(value))


def log_y_rate(axes: Axes) -> None:
    """A decimal axis in 1k, 2k, 5k, 10k with at most eight ticks."""
    _log_y(axes, 10, lambda value, _: short_rate(value))


def log_y_plain(axes: Axes) -> None:
    """A decimal axis in plain numbers (milliseconds, losses) with at most eight ticks."""
    _log_y(axes, 10, lambda value, _: f"{value:g}")


def _log_y(axes: Axes, base: int, write: Any) -> None:
    axes.set_yscale("log", base=base)
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(FixedLocator(_log_ticks(low, high, base)))
    axes.yaxis.set_major_formatter(FuncFormatter(write))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(low, high)


def _log_ticks(low: float, high: float, base: int) -> list[float]:
    start, stop = math.floor(math.log(low, base)), math.ceil(math.log(high, base))
    powers = [float(base) ** exponent for exponent in range(start, stop + 1)]
    ticks: list[float] = []
    for factors in TICK_FACTORS[base]:
        ticks = [power * factor for power in powers for factor in factors]
        ticks = [tick for tick in ticks if low <= tick <= high]
        if len(ticks) >= 4:
            break
    return ticks[:: math.ceil(len(ticks) / 8)] if ticks else [low, high]


def pad_log(axes: Axes, factor: float = 1.25) -> None:
    """Widen a logarithmic vertical axis by a factor at both ends."""
    low, high = axes.get_ylim()
    axes.set_ylim(low / factor, high * factor)
