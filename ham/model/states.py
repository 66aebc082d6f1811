"""The two decoding memories that most mixers need; a mixer with another one defines its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ham.cache import DenseKVCache, WindowKVCache
from ham.model.mixer import MixerState


@dataclass
class CacheState(MixerState):
    """Keys and values, and the inputs that a short convolution still needs if there is one."""

    cache: DenseKVCache | WindowKVCache
    history_BWC: Tensor | None = None

    def tensors(self) -> dict[str, list[Tensor]]:
        """All tensors held, by kind."""
        conv = {} if self.history_BWC is None else {"conv": [self.history_BWC]}
        return {"kv": self.cache.tensors(), **conv}

    def select(self, index_B: Tensor) -> None:
        """Keep the sequences `index_B`, in that order."""
        self.cache.select(index_B)
        if self.history_BWC is not None:
            self.history_BWC = self.history_BWC[index_B]

    @classmethod
    def join(cls, states: Sequence[Self]) -> Self:
        """One memory of all sequences of `states`."""
        caches = [state.cache for state in states]
        histories = [state.history_BWC for state in states if state.history_BWC is not None]
        return cls(type(caches[0]).join(caches), torch.cat(histories) if histories else None)


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

    @classmethod
    def join(cls, states: Sequence[Self]) -> Self:
        """One memory of all sequences of `states`."""
        return cls(
            torch.cat([state.recurrent for state in states]),
            torch.cat([state.history_BWC for state in states]),
        )
