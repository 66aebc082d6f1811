"""How numbers are written for readers: units, digits, intervals, n."""

from __future__ import annotations

import math
from collections.abc import Callable

from ham.report.aggregate import Cell

NOT_APPLICABLE = "–"
MAX_REASON = 60

Formatter = Callable[[float], str]


def bits(value: float) -> str:
    """Bits per byte, nats and other losses: three decimals."""
    return f"{value:.3f}".replace("-", "−")


def signed_bits(value: float) -> str:
    """A difference of losses, with its sign."""
    return f"{value:+.3f}".replace("-", "−")


def share(value: float) -> str:
    """A share in 0..1 as a percentage."""
    return f"{value * 100:.1f} %".replace("-", "−")


def significant(value: float) -> str:
    """Three significant digits without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}".replace("-", "−")


def count(value: float) -> str:
    """A whole number with thousands separated."""
    return f"{round(value):,}".replace("-", "−")


def parameters(value: float) -> str:
    """A number of parameters: 644,352 as `0.644 M`."""
    return f"{value / 1e6:.3f} M" if value < 1e8 else f"{value / 1e9:.3f} B"


def byte_size(value: float) -> str:
    """Bytes with binary units and three significant digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{significant(value)} {unit}"


def short_rate(value: float) -> str:
    """A rate for an axis: 12,000 as `12k`."""
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:g}{suffix}"
    return f"{value:g}"


def short_bytes(value: float) -> str:
    """Bytes for an axis, without decimals where they are zero."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            return f"{value:.3g} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def reason(error: str, limit: int = MAX_REASON) -> str:
    """The first line of an error, shortened."""
    first = error.strip().splitlines()[0] if error.strip() else "unknown"
    return first if len(first) <= limit else first[: limit - 1].rstrip() + "…"


def spread(cell: Cell, write: Formatter) -> str:
    """The interval of a cell: `± h` over seeds, `[low, high]` within one run, or nothing."""
    estimate = cell.estimate
    if estimate is None or estimate.low is None or estimate.high is None:
        return ""
    if estimate.n > 1:
        return f"± {write(estimate.half_width or 0.0).lstrip('+')}"
    return f"[{write(estimate.low)}, {write(estimate.high)}]"


def sample_size(cell: Cell) -> str:
    """`n=3`, or `n=2; 1 failed` where seeds are missing."""
    if cell.estimate is None:
        return ""
    failed = f"; {len(cell.errors)} failed" if cell.errors else ""
    return f"n={cell.estimate.n}{failed}"


def cell_text(cell: Cell, write: Formatter) -> str:
    """A cell in one line: value, interval, n; or `failed: reason`; or `not run`."""
    if cell.status == "failed":
        return f"failed: {reason(cell.errors[0])}"
    if cell.value is None:
        return "not run"
    parts = [write(cell.value), spread(cell, write), f"({sample_size(cell)})"]
    return " ".join(part for part in parts if part)


def join_words(words: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    if len(words) <= 1:
        return "".join(words)
    return f"{', '.join(words[:-1])} and {words[-1]}"
