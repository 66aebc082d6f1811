"""One colour, marker and dash for a model, in every figure and every report.

Known arms have fixed styles: a family has a hue (warm the HAM scores, blue the transformers, green
and amber the recurrent models, violet the hybrids, sky blue the windows), a member a marker and a
dash, an arm at half of the cache a half-filled marker and dashes. Hues are those of the
colour-blind-safe palette of Okabe and Ito (2008) and others that stay apart from them when red and
green look alike; its black and yellow are left out, because they vanish on a dark and on a white
page. Other arms get a colour and a marker from the hash of their name, a dashed line, and the next
free pair where two collide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace

INK = "#1f2328"
MUTED = "#656d76"
GRID = "#e2e5e9"
PAPER = "#ffffff"


@dataclass(frozen=True)
class Style:
    """How a model is drawn.

    Attributes:
        color: As `#rrggbb`.
        marker: Of matplotlib.
        dash: Line style of matplotlib.
        half: Whether the marker is filled by half.
    """

    color: str
    marker: str
    dash: str
    half: bool = False


def _at_half(style: Style) -> Style:
    return replace(style, dash="--", half=True)


_FULL = {
    "transformer": Style("#0072b2", "o", "-"),
    "sliding-window": Style("#56b4e9", "s", "-"),
    "gated-delta-rule": Style("#009e73", "^", "-"),
    "mamba2": Style("#e69f00", "D", "-"),
    "ham-cosine": Style("#d55e00", "*", "-"),
    "ham-committed": Style("#cc79a7", "v", "-"),
    "ham-random": Style("#8b4a1f", "X", "-"),
    "ham-learned": Style("#a3123f", "p", "-"),
    "ham-lexical": Style("#e58a5e", ">", "-"),
    "ham-oracle": Style("#7a7a7a", "h", "-."),
    "ham-prefix": Style("#7a7a7a", "<", ":"),
    "transformer-conv": Style("#0072b2", "P", "-."),
    "hybrid-3-to-1": Style("#7b68ee", "d", "-"),
    "delta-rule-window": Style("#56b4e9", "H", "-."),
}
_SCORES = ("cosine", "committed", "random", "learned", "lexical")
KNOWN_STYLES = {
    **_FULL,
    **{f"ham-{score}-0.5": _at_half(_FULL[f"ham-{score}"]) for score in _SCORES},
    "hybrid-1-to-1": _at_half(_FULL["hybrid-3-to-1"]),
    "delta-rule-window-0.5": _at_half(_FULL["delta-rule-window"]),
}
# Come first in tables and legends; others follow by name.
FIRST = tuple(_FULL)[:6]

# Middle lightness, so that they show on white and on dark pages (after Tol's "muted" set).
EXTRA_COLORS = ("#5b7083", "#a89a00", "#9b2f9a", "#3a8f8f", "#a0705a", "#5b8c2a")
EXTRA_MARKERS = ("<", ">", "p", "h", "d", "8", "X", "H")


def model_styles(models: Iterable[str]) -> dict[str, Style]:
    """The style of each model; the same names always get the same styles."""
    names = set(models)
    styles = {name: KNOWN_STYLES[name] for name in KNOWN_STYLES if name in names}
    taken: set[int] = set()
    for name in sorted(names - KNOWN_STYLES.keys()):
        slot = _free_slot(name, taken)
        taken.add(slot)
        styles[name] = _extra_style(slot)
    return styles


def order_models(models: Iterable[str]) -> list[str]:
    """The first arms in their order, then the others by name."""
    names = set(models)
    return [name for name in FIRST if name in names] + sorted(names.difference(FIRST))


def shades(color: str, count: int) -> list[str]:
    """`count` shades of one colour, the colour itself first, then mixed with grey-white."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    mixed = []
    for index in range(count):
        part = 0.0 if count == 1 else 0.55 * index / (count - 1)
        channels = (round(c + (200 - c) * part) for c in (red, green, blue))
        mixed.append("#" + "".join(f"{channel:02x}" for channel in channels))
    return mixed


def on_dark(color: str) -> str:
    """The same hue for a dark page: lighter where it would be too dark to read."""
    channels = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    brightness = 0.299 * channels[0] + 0.587 * channels[1] + 0.114 * channels[2]
    part = max(0.0, min(0.2, (120 - brightness) / 100))
    return "#" + "".join(f"{round(c + (255 - c) * part):02x}" for c in channels)


def _free_slot(name: str, taken: set[int]) -> int:
    start = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
    slots = len(EXTRA_COLORS) * len(EXTRA_MARKERS)
    used_colors = {slot % len(EXTRA_COLORS) for slot in taken}
    candidates = [(start + step) % slots for step in range(slots)]
    for fresh_color in (True, False):
        for slot in candidates:
            reused = slot % len(EXTRA_COLORS) in used_colors
            if slot not in taken and not (fresh_color and reused):
                return slot
    return start % slots


def _extra_style(slot: int) -> Style:
    color = EXTRA_COLORS[slot % len(EXTRA_COLORS)]
    return Style(color, EXTRA_MARKERS[slot // len(EXTRA_COLORS)], "--")
