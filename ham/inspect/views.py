"""What the page shows for one layer, or for all of them together: levels, marks, curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from ham.inspect.shares import format_number, format_share, kept_share
from ham.inspect.text import Piece, TokenText
from ham.inspect.trace import LayerTrace

LEVELS = 10
_BINS = 48
_STRIP_WIDTH, _STRIP_HEIGHT = 480, 84


@dataclass(frozen=True)
class View:
    """One layer, or all.

    Attributes:
        key: `layer-0`, or `all`.
        title: For readers.
        levels: Colour of every piece, 0..9.
        kept: Mark of every piece: 0 not kept, 1 kept in part, 2 kept.
        pattern: What is said about a piece, `{}` in place of its detail.
        details: Scores of every piece, or in how many layers it is kept.
        facts: Name and value of what holds for the whole view.
        legend: Text below each of the ten colours.
        mark: Where on the legend, 0..1, the threshold stands; None without one.
        strip: SVG of the realised share along the text.
    """

    key: str
    title: str
    levels: list[int]
    kept: list[int]
    pattern: str
    details: list[str]
    facts: list[tuple[str, str]]
    legend: list[str]
    mark: float | None
    strip: Markup


def layer_view(tokens: TokenText, trace: LayerTrace) -> View:
    """The view of one layer: colour by the quantile of the score among this layer's scores."""
    scores = np.array([_highest(trace.score_T, piece) for piece in tokens.pieces])
    edges = np.quantile(trace.score_T, np.arange(1, LEVELS) / LEVELS)
    share = kept_share(trace)
    title = f"layer {trace.layer}"
    return View(
        key=f"layer-{trace.layer}",
        title=title,
        levels=np.searchsorted(edges, scores, side="right").tolist(),
        kept=[_mark(trace.kept_T[piece.start : piece.end]) for piece in tokens.pieces],
        pattern=f"score {{}} · threshold {format_number(trace.threshold)}",
        details=[_numbers(trace.score_T[piece.start : piece.end]) for piece in tokens.pieces],
        facts=[
            ("kept", format_share(share)),
            ("target", f"{100 * trace.target:.1f} %"),
            ("threshold", format_number(trace.threshold)),
            ("tokens", f"{share.n:,}"),
        ],
        legend=_score_legend(trace.score_T, edges),
        mark=float((trace.score_T < trace.threshold).mean()),
        strip=strip_plot(trace.kept_T, trace.target, title),
    )


def all_layers_view(tokens: TokenText, traces: Sequence[LayerTrace]) -> View:
    """The view over the traced layers: colour by the share of them that keep a token."""
    kept_LT = np.stack([trace.kept_T for trace in traces])
    count_T, mean_T = kept_LT.sum(axis=0), kept_LT.mean(axis=0)
    shares = np.array([_highest(mean_T, piece) for piece in tokens.pieces])
    target = float(np.mean([trace.target for trace in traces]))
    title = f"all {len(traces)} layers"
    return View(
        key="all",
        title=title,
        levels=np.minimum(np.ceil(shares * (LEVELS - 1)), LEVELS - 1).astype(int).tolist(),
        kept=[_mark(mean_T[piece.start : piece.end]) for piece in tokens.pieces],
        pattern=f"in {{}} of {len(traces)} layers",
        details=[_numbers(count_T[piece.start : piece.end]) for piece in tokens.pieces],
        facts=[
            ("kept, mean of layers", f"{100 * mean_T.mean():.1f} %"),
            ("target, mean", f"{100 * target:.1f} %"),
            ("kept in every layer", f"{100 * (mean_T >= 1).mean():.1f} %"),
            ("kept in no layer", f"{100 * (mean_T <= 0).mean():.1f} %"),
        ],
        legend=["no layer", *[""] * (LEVELS - 2), "every layer"],
        mark=None,
        strip=strip_plot(mean_T, target, title),
    )


def strip_plot(kept_T: np.ndarray, target: float, title: str) -> Markup:
    """Bars of the realised share in equal parts of the text, and a dashed line at the target."""
    parts = np.array_split(kept_T, min(_BINS, len(kept_T)))
    means = [float(part.mean()) for part in parts]
    width = _STRIP_WIDTH / len(parts)
    bars = "".join(
        f'<rect x="{index * width:.2f}" y="{_STRIP_HEIGHT * (1 - mean):.2f}" '
        f'width="{max(width - 1, 0.5):.2f}" height="{_STRIP_HEIGHT * mean:.2f}"/>'
        for index, mean in enumerate(means)
    )
    label = (
        f"Share of tokens kept along the text, {title}: {len(parts)} parts, from "
        f"{100 * min(means):.0f} % to {100 * max(means):.0f} %; target {100 * target:.0f} %"
    )
    line = _STRIP_HEIGHT * (1 - target)
    # Numbers and our own words only: nothing to escape.
    return Markup(
        f'<svg viewBox="0 -1 {_STRIP_WIDTH} {_STRIP_HEIGHT + 2}" preserveAspectRatio="none" '
        f'role="img" aria-label="{label}">{bars}'
        f'<line x1="0" x2="{_STRIP_WIDTH}" y1="{line:.2f}" y2="{line:.2f}"/></svg>'
    )


def _highest(values_T: np.ndarray, piece: Piece) -> float:
    return float(values_T[piece.start : piece.end].max())


def _mark(kept_T: np.ndarray) -> int:
    if not kept_T.any():
        return 0
    return 2 if (kept_T >= 1).all() else 1


def _numbers(values: np.ndarray) -> str:
    return ", ".join(format_number(float(value)) for value in values)


def _score_legend(score_T: np.ndarray, edges: np.ndarray) -> list[str]:
    lows = [float(score_T.min()), *map(float, edges)]
    highs = [*map(float, edges), float(score_T.max())]
    return [
        f"{format_number(low)} to {format_number(high)}"
        for low, high in zip(lows, highs, strict=True)
    ]
