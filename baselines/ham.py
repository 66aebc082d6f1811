"""HAM as an arm of the comparison; the layer itself is `ham.layer`."""

from __future__ import annotations

from ham.layer import HamMixer
from ham.model.registry import register_baseline


@register_baseline("ham")
class Ham(HamMixer):
    """The Hybrid Associative Memory layer in every block."""
