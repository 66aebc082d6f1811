"""Shares of tokens kept, by class of token and layer, as numbers, as a table and as result rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ham.inspect.classes import CLASSES
from ham.inspect.text import TokenText, shown
from ham.inspect.trace import LayerTrace
from ham.report.statistics import Estimate, wilson_interval

if TYPE_CHECKING:
    from ham.report.rows import RowWriter

EXPERIMENT = "inspect"
ALL_TOKENS = "all tokens"
_CONTEXT_TOKENS = 12


def kept_share(trace: LayerTrace, chosen_T: np.ndarray | None = None) -> Estimate | None:
    """Share of the chosen tokens that a layer keeps, with Wilson's 95 % interval.

    The interval treats tokens as independent, which neighbours are not: it is a lower bound of the
    uncertainty.

    Args:
        trace: The layer's decisions.
        chosen_T: Boolean; all tokens when None.

    Returns:
        None where no token was chosen.
    """
    kept = trace.kept_T if chosen_T is None else trace.kept_T[chosen_T]
    return wilson_interval(float(kept.sum(dtype=np.float64)), len(kept)) if len(kept) else None


def class_shares(
    classes_T: np.ndarray, traces: Sequence[LayerTrace]
) -> list[tuple[str, int, list[Estimate]]]:
    """Name, tokens and share of each layer, for all tokens and for every class that occurs."""
    lines = [(ALL_TOKENS, len(classes_T), [kept_share(trace) for trace in traces])]
    for index, name in enumerate(CLASSES):
        chosen_T = classes_T == index
        if chosen_T.any():
            shares = [kept_share(trace, chosen_T) for trace in traces]
            lines.append((name, int(chosen_T.sum()), shares))
    return lines


def format_number(value: float) -> str:
    """A score or a threshold for readers."""
    return f"{value:.4g}" if math.isfinite(value) else ("∞" if value > 0 else "−∞")


def format_share(estimate: Estimate) -> str:
    """`25.0 % [18.1, 33.4]`."""
    low, high = 100 * estimate.low, 100 * estimate.high
    return f"{100 * estimate.value:.1f} % [{low:.1f}, {high:.1f}]"


def table_lines(classes_T: np.ndarray, traces: Sequence[LayerTrace]) -> list[str]:
    """The table for a terminal: classes down, layers across, then targets and thresholds."""
    grid = [["class", "n", *(f"layer {trace.layer}" for trace in traces)]]
    for name, count, shares in class_shares(classes_T, traces):
        grid.append([name, str(count), *(format_share(share) for share in shares)])
    grid.append(["target", "", *(f"{100 * trace.target:.1f} %" for trace in traces)])
    grid.append(["threshold", "", *(format_number(trace.threshold) for trace in traces)])
    return aligned_lines(grid)


def aligned_lines(grid: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equally many cells as lines: first column to the left, others to the right."""
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = []
    for first, *others in grid:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def top_lines(tokens: TokenText, trace: LayerTrace, count: int) -> list[str]:
    """The `count` pieces of the text with a layer's highest scores, in their context."""
    scores = [float(trace.score_T[piece.start : piece.end].max()) for piece in tokens.pieces]
    order = sorted(range(len(scores)), key=lambda index: (-scores[index], index))
    lines = []
    for index in order[:count]:
        piece = tokens.pieces[index]
        mark = "kept" if trace.kept_T[piece.start : piece.end].any() else "not kept"
        before = _plain(tokens, index - _CONTEXT_TOKENS, index)
        after = _plain(tokens, index + 1, index + 1 + _CONTEXT_TOKENS)
        name = CLASSES[tokens.classes_T[piece.start]]
        text = f"{before}[{_plain(tokens, index, index + 1)}]{after}"
        lines.append(f"{format_number(scores[index]):>8}  {mark}  {piece.start:>5}  {text}  {name}")
    return lines


def add_rows(writer: RowWriter, classes_T: np.ndarray, traces: Sequence[LayerTrace]) -> None:
    """Append one row of `kept_fraction` for every class and layer."""
    for name, count, shares in class_shares(classes_T, traces):
        for trace, share in zip(traces, shares, strict=True):
            writer.add(
                EXPERIMENT,
                "kept_fraction",
                share.value,
                n=count,
                low=share.low,
                high=share.high,
                interval=share.interval,
                kv_fraction=trace.fraction,
                labels={"class": name, "layer": trace.layer},
            )


def _plain(tokens: TokenText, start: int, end: int) -> str:
    """Pieces on one line."""
    text = "".join(piece.text for piece in tokens.pieces[max(start, 0) : max(end, 0)])
    return shown(text).replace("⇥\t", "⇥").replace("↵\n", "↵")
