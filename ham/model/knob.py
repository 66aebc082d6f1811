"""The option of a mixer that decides how much decoding remembers, for matching budgets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ham.model.mixer import MixerOptions, MixerShape

INTEGERS = 1 << 24
"""How many integers a knob without choices of its own is searched over."""


@dataclass(frozen=True)
class Knob:
    """One option of a mixer, and the values that `ham match` may give it.

    More of it must never take fewer bytes. What a value costs is not declared here: that is
    `SequenceMixer.state_bytes`. Values that the mixer refuses are passed over.

    Attributes:
        option: Name of the option.
        least: Smallest integer.
        step: Distance between integers.
        choices: From the shape to all values, in increasing order; None for the integers.
        share: The option is the share of the tokens read that enter the cache. Its values are
            whole tokens of the length at hand.
        where: Values that other options must have for this one to count.
    """

    option: str
    least: int = 1
    step: int = 1
    choices: Callable[[MixerShape], Sequence[Any]] | None = None
    share: bool = False
    where: Mapping[str, Any] = field(default_factory=dict)

    def applies(self, options: MixerOptions) -> bool:
        """Whether the other options let this one count."""
        return all(getattr(options, name) == value for name, value in self.where.items())

    def values(self, shape: MixerShape, context: int) -> Sequence[Any]:
        """What may be tried for a memory of `context` tokens, in increasing order."""
        if self.share:
            return [tokens / context for tokens in range(context + 1)]
        if self.choices is not None:
            return self.choices(shape)
        return range(self.least, self.least + self.step * INTEGERS, self.step)
