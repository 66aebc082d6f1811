"""The two decoding memories that most mixers need; a mixer with another one defines its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ham.cache import DenseKVCache, WindowKVCache
from ham.model.mixer import MixerState


@dataclass
class CacheState(MixerState):
    """Keys and values, and nothing else."""

    cache: DenseKVCache | WindowKVCache

    def tensors(self) -> dict[str, list[Tensor]]:
        """All tensors held, by kind."""
        return {"kv": self.cache.tensors()}

    def select(self, index_B: Tensor) -> None:
        """Keep the sequences `index_B`, in that order."""
        self.cache.select(index_B)


@dataclass
class RecurrentState(MixerState):
    """A recurrent state, batch first, and the inputs that a short convolution still needs."""

    recurrent: Tensor
    history_BWC: Tensor

    def tensors(self) -> dict[str, list[Tensor]]:
        """All tensors held, by kind."""
        return {"recurrent": [self.recurrent], "conv": [self.history_BWC]}

    def select(self, index_B: Tensor) -> None:
        """Keep the sequences `index_B`, in that order."""
        self.recurrent = self.recurrent[index_B]
        self.history_BWC = self.history_BWC[index_B]
