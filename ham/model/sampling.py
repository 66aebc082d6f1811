"""How the next token is chosen from its logits.

The random number of a token depends on the seed, on the number of its prompt and on how many
tokens came before, and on nothing else: neither the device nor the other prompts of the batch.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ham.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """Rules of choice: greedy at temperature 0, else a draw from the softmax.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Draw from this many most likely tokens only.
        top_p: Then from the fewest of them that have this share of the probability (Holtzman et
            al. 2019, arXiv 1904.09751).
        seed: Any int.

    Raises:
        ConfigError: For a value outside its legal set.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature {self.temperature}; legal: a finite number >= 0")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k {self.top_k}; legal: an integer >= 1, or none")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p {self.top_p}; legal: 0 < top_p <= 1, or none")

    def random_numbers(self, prompt: int) -> random.Random:
        """The source of random numbers of prompt number `prompt`.

        Python's own generator: seeding with a text goes through SHA-512, so neighbouring seeds are
        unrelated, and torch's takes only 32 bits of a seed on a CPU.
        """
        return random.Random(f"{self.seed}/{prompt}")

    def choose(self, logits_BV: Tensor, sources: Sequence[random.Random]) -> Tensor:
        """Next token of each sequence, int64 `tokens_B`; takes one number of each source."""
        if self.temperature == 0:
            return logits_BV.argmax(dim=-1)
        drawn = [source.random() for source in sources]
        uniform_B = torch.tensor(drawn, dtype=torch.float64, device=logits_BV.device)
        return self._draw(logits_BV, uniform_B)

    def _draw(self, logits_BV: Tensor, uniform_B: Tensor) -> Tensor:
        """The token at which the cumulative probability, likely tokens first, passes `uniform_B`.

        In float64, so that the sums over a large vocabulary do not round a rare token away.
        """
        wide_BV, order_BV = logits_BV.double().sort(dim=-1, descending=True, stable=True)
        # The maximum first: dividing it by a tiny temperature would overflow.
        weight_BV = ((wide_BV - wide_BV[:, :1]) / self.temperature).softmax(dim=-1)
        if self.top_k is not None:
            weight_BV[:, self.top_k :] = 0
        reached_BV = weight_BV.cumsum(dim=-1)
        if self.top_p is not None:
            before_BV = reached_BV - weight_BV
            weight_BV = weight_BV.where(before_BV < self.top_p * reached_BV[:, -1:], 0.0)
            reached_BV = weight_BV.cumsum(dim=-1)
        passed_BV = reached_BV <= uniform_B[:, None] * reached_BV[:, -1:]
        last_B = (weight_BV > 0).sum(dim=-1) - 1
        # Rounding may let the number reach the whole sum; the last token that has a chance is it.
        rank_B = passed_BV.sum(dim=-1).minimum(last_B.clamp(min=0))
        return order_BV.gather(1, rank_B[:, None])[:, 0]
