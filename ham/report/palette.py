"""One colour, marker and dash for a model, in every figure and every report.

Known arms have fixed styles from the colour-blind-safe palette of Okabe and Ito (2008); its black
and yellow are left out, because they vanish on a dark and on a white page. Other arms get a colour
and a marker from the hash of their name, a dashed line, and the next free pair where two collide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

INK = "#1f2328"
MUTED = "#656d76"
GRID = "#e2e5e9"
PAPER = "#ffffff"


@dataclass(frozen=True)
class Style:
    """How a model is drawn."""

    color: str
    marker: str
    dash: str


KNOWN_STYLES = {
    "transformer": Style("#0072b2", "o", "-"),
    "sliding-window": Style("#56b4e9", "s", "-"),
    "gated-delta-rule": Style("#009e73", "^", "-"),
    "mamba2": Style("#e69f00", "D", "-"),
    "ham-cosine": Style("#d55e00", "*", "-"),
    "ham-committed": Style("#cc79a7", "v", "-"),
}

# Middle lightness, so that they show on white and on dark pages (after Tol's "muted" set).
EXTRA_COLORS = ("#7a7a7a", "#a89a00", "#9b2f6a", "#6a5acd", "#8b5a2b", "#5b8c2a")
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
    """Known arms in the order of the fixed table, then the others by name."""
    names = set(models)
    return [name for name in KNOWN_STYLES if name in names] + sorted(names - KNOWN_STYLES.keys())


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
