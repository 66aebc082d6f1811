"""How numbers are written for readers: units, digits, intervals, n."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Protocol

from ham.report.aggregate import Cell

NOT_APPLICABLE = "–"
MAX_REASON = 60
BIG = 1e6


class Formatter(Protocol):
    """Writes a number; `like` is the number whose unit and decimals it shall share."""

    def __call__(self, value: float, like: float | None = None) -> str:
        """The number as text."""


def bits(value: float, like: float | None = None) -> str:
    """Bits per byte, nats and other losses: three decimals."""
    return _minus(f"{value:.3f}")


def signed_bits(value: float, like: float | None = None) -> str:
    """A difference of losses, with its sign."""
    return _minus(f"{value:+.3f}")


def share(value: float, like: float | None = None) -> str:
    """A share in 0..1 as a percentage."""
    return _minus(f"{value * 100:.1f} %")


def points(value: float, like: float | None = None) -> str:
    """A difference of shares in percentage points, with its sign and without the unit."""
    return _minus(f"{value * 100:+.1f}")


def significant(value: float, like: float | None = None) -> str:
    """Three significant digits without an exponent."""
    pattern = value if like is None else like
    if pattern == 0 or not math.isfinite(value) or not math.isfinite(pattern):
        return _minus(f"{value:g}")
    digits = max(0, 2 - math.floor(math.log10(abs(pattern))))
    return _minus(f"{value:,.{digits}f}")


def scientific(value: float, like: float | None = None) -> str:
    """Three significant digits; beyond a million as a power of ten."""
    pattern = abs(value if like is None else like)
    if not BIG < pattern < math.inf:
        return significant(value, like)
    power = math.floor(math.log10(pattern))
    return _minus(f"{value / 10**power:.2f} × 10^{power}")


def count(value: float, like: float | None = None) -> str:
    """A whole number with thousands separated."""
    return _minus(f"{round(value):,}")


def parameters(value: float, like: float | None = None) -> str:
    """A number of parameters: 644,352 as `0.644 M`."""
    pattern = value if like is None else like
    return f"{value / 1e6:.3f} M" if pattern < 1e9 else f"{value / 1e9:.3f} B"


def byte_size(value: float, like: float | None = None) -> str:
    """Bytes with binary units and three significant digits."""
    pattern = value if like is None else like
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(pattern) < 1024 or unit == "GiB":
            break
        value, pattern = value / 1024, pattern / 1024
    return f"{value:.0f} B" if unit == "B" else f"{significant(value, pattern)} {unit}"


def plain(value: float, like: float | None = None) -> str:
    """A number as Python writes it."""
    return f"{value:g}"


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


def token_labels(values: Iterable[float]) -> Callable[[float], str]:
    """How an axis writes lengths: plain, or in units of 1,024 where they are long."""
    known = list(values)
    binary = all(value < 1024 or value % 1024 == 0 for value in known)
    if binary and max(known, default=0.0) >= 8192:
        return lambda value: f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"
    return lambda value: f"{value:,.0f}"


def token_unit(values: Iterable[float]) -> str:
    """The unit that belongs to `token_labels`."""
    return "tokens, k = 1,024" if token_labels(values)(1024.0) == "1k" else "tokens"


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
        return f"± {write(estimate.half_width or 0.0, like=estimate.value).lstrip('+')}"
    ends = (write(end, like=estimate.value) for end in (estimate.low, estimate.high))
    return f"[{', '.join(end.removesuffix(' %') for end in ends)}]"


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


def _minus(text: str) -> str:
    """With a true minus sign."""
    return text.replace("-", "−")
