"""When tokens are evicted, and how many stay: arithmetic on the number of tokens read.

After every `interval` tokens the cache is cut to its budget; until then it takes every token. So
what a query sees follows from the number of tokens read alone, and not from how a text was cut into
calls: the parallel form, prefill in pieces and single steps run the same schedule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ham.eviction.options import EvictionConfig

# Keeps 0.29 x 100 at 29, which binary fractions make 28.999...
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Schedule:
    """The evictions of one layer.

    Attributes:
        interval: Tokens from one eviction to the next.
        fraction: Share of the tokens read that stays; None where `tokens` is given.
        tokens: Number of tokens that stay; None where `fraction` is given.
        least: Tokens that stay under a small share.
    """

    interval: int
    fraction: float | None
    tokens: int | None = None
    least: int = 1

    @classmethod
    def of_layer(cls, options: EvictionConfig, layer: int) -> Schedule:
        """The schedule of one layer; a skipped one keeps everything."""
        if layer < options.skip_layers:
            return cls(options.interval, 1.0)
        least = max(1, options.always_kept)
        return cls(options.interval, options.fraction, options.tokens, least)

    def budget(self, read: int) -> int:
        """Most tokens that stay at an eviction after `read` tokens."""
        if self.fraction is None:
            return self.tokens
        return max(self.least, math.floor(self.fraction * read + _ROUNDING))

    def held(self, read: int) -> int:
        """Tokens in the cache once `read` tokens were read."""
        return self._after_eviction(read) + read % self.interval

    def slots(self, read: int) -> int:
        """Tokens that the cache has room for then: what the last eviction left, and an interval."""
        return self._after_eviction(read) + self.interval

    def until_eviction(self, read: int) -> int:
        """Tokens to read until the next eviction, 1..interval."""
        return self.interval - read % self.interval

    def pairs(self, tokens: int, last: int | None = None) -> float:
        """Query-key pairs of a text of `tokens`.

        With `last`, only those of the last queries before each eviction.
        """
        first = 0 if last is None else self.interval - last
        total = 0
        for start in range(0, tokens, self.interval):
            queries = range(first, min(self.interval, tokens - start))
            total += len(queries) * (self.held(start) + 1) + sum(queries)
        return float(total)

    def _after_eviction(self, read: int) -> int:
        # A budget grows by at most one per token, so an eviction never finds less than it may keep,
        # unless nothing was evicted yet.
        last = read - read % self.interval
        return min(last, self.budget(last))
