"""Do two drawings of one figure show the same, where their bytes differ?

Another version of matplotlib, FreeType or Pillow writes other bytes for the same figure: letters
are drawn and placed a little differently, everything else is drawn where it was (matplotlib 3.9.4
with FreeType 2.6.1 against 3.11.2 with 2.14.3, every published figure). So SVG files are compared
by their words, styles and coordinates, letters apart; PNG files by their decoded pixels, which is
coarse: it finds another figure, not a point that moved.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple
from xml.etree import ElementTree

import matplotlib
import numpy as np

from ham.report.plots_base import DPI

# Points of 1/72 inch, by what lies there. Shapes are written with six decimals and lay where they
# were; a legend is laid out around its letters (0.27 points between the versions named above), a
# heat map is snapped to pixels (0.72), words move with the width of their letters (2.1).
TOLERANCES = {"shape": 0.01, "legend": 0.5, "image": 1.0, "text": 3.0}
# Share of pixels that may differ by more than PIXEL_LEVELS of 255; letters alone reached 0.038.
PIXEL_SHARE = 0.06
PIXEL_LEVELS = 32

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
_GEOMETRY = ("d", "x", "y", "width", "height", "transform", "viewBox")
_STABLE_ID = re.compile(r"[\w.]*[a-z]_\d+")


class Mark(NamedTuple):
    """One element: what it is in words, where it is in numbers and how exactly, and its pixels."""

    words: str
    numbers: tuple[float, ...]
    tolerance: float
    picture: bytes


def drawing_versions() -> dict[str, str]:
    """Versions of what the bytes of a figure depend on."""
    import PIL
    from matplotlib import ft2font

    return {
        "freetype": ft2font.__freetype_version__,
        "matplotlib": matplotlib.__version__,
        "pillow": PIL.__version__,
    }


def svg_difference(one: str, other: str) -> str | None:
    """The first difference that a reader could see, or None.

    Args:
        one, other: SVG text, a whole file or an `<svg>` element of a page.

    Raises:
        xml.etree.ElementTree.ParseError: If a text is not SVG.
    """
    for left, right in itertools.zip_longest(_marks(one), _marks(other)):
        difference = _mark_difference(left, right)
        if difference is not None:
            return difference
    return None


def png_difference(one: bytes, other: bytes) -> str | None:
    """How two PNG files differ once decoded, or None; a row or column more is not a difference."""
    from PIL import Image

    left, right = (
        np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.int16)
        for data in (one, other)
    )
    if max(abs(a - b) for a, b in zip(left.shape, right.shape, strict=True)) > 1:
        sizes = " against ".join(f"{data.shape[1]} x {data.shape[0]}" for data in (left, right))
        return f"{sizes} pixels at {DPI} dpi"
    height, width = (min(left.shape[axis], right.shape[axis]) for axis in (0, 1))
    distance = np.abs(left[:height, :width] - right[:height, :width]).max(axis=2)
    share = float((distance > PIXEL_LEVELS).mean())
    return f"{share:.1%} of the pixels differ" if share > PIXEL_SHARE else None


def _marks(svg: str) -> Iterator[Mark]:
    # An element of a page has no name spaces, and a name without one is easier to compare.
    text = re.sub(r'\sxmlns(?::\w+)?="[^"]*"', "", svg[svg.index("<svg") :])
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href=", "href=")
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    yield from _walk(ElementTree.fromstring(text, parser))


def _walk(parent: ElementTree.Element, shape: str = "shape") -> Iterator[Mark]:
    """Marks in document order; matplotlib puts a text as a comment before its letters."""
    words = None
    for child in parent:
        if child.tag is ElementTree.Comment:
            words = (child.text or "").strip()
        elif words is not None:
            yield _mark(child, f"text {words}", TOLERANCES["text"])
            words = None
        elif child.tag == "image":
            yield _mark(child, "image", TOLERANCES["image"])
        else:
            yield _mark(child, str(child.tag), TOLERANCES[shape])
            inside = "legend" if "legend_" in child.get("id", "") else shape
            yield from _walk(child, inside)


def _mark(element: ElementTree.Element, kind: str, tolerance: float) -> Mark:
    geometry = " ".join(element.get(name, "") for name in _GEOMETRY)
    # Other ids are hashes of what they name, which is compared itself.
    name = _STABLE_ID.search(element.get("id", ""))
    letters = " ".join(_NUMBER.sub("", geometry).split())
    words = [kind, name and name[0], element.get("style"), letters]
    numbers = tuple(float(number) for number in _NUMBER.findall(geometry))
    _, _, picture = element.get("href", "").partition("base64,")
    return Mark(" ".join(filter(None, words)), numbers, tolerance, base64.b64decode(picture))


def _mark_difference(left: Mark | None, right: Mark | None) -> str | None:
    if left is None or right is None:
        extra = left or right
        return f"only one has {extra.words!r}"
    if left.words != right.words:
        return f"{left.words!r} against {right.words!r}"
    pairs = itertools.zip_longest(left.numbers, right.numbers, fillvalue=math.inf)
    furthest = max((abs(one - other) for one, other in pairs), default=0.0)
    if furthest > left.tolerance:
        return f"{left.words!r} lies {furthest:.3g} points away"
    if left.picture != right.picture:
        return png_difference(left.picture, right.picture)
    return None
