"""The decoding memory of a whole decoder: that of each layer, and how far each sequence is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from ham.model.mixer import MixerState
from ham.model.positions import Positions


@dataclass
class DecoderState:
    """The decoding memory of all layers.

    Attributes:
        layers: One memory per layer.
        positions: How far each sequence has been read.
    """

    layers: list[MixerState]
    positions: Positions

    @classmethod
    def join(cls, states: Sequence[Self]) -> Self:
        """One memory of all sequences of `states`, which may stand at different positions.

        `states` stay as they are, so both exist at the same time.
        """
        layers = zip(*(state.layers for state in states), strict=True)
        return cls(
            [type(parts[0]).join(parts) for parts in layers],
            Positions.join([state.positions for state in states]),
        )

    @property
    def position(self) -> int | Tensor:
        """Tokens read: an int while all sequences agree, else an int64 tensor `[B]`."""
        return self.positions.value

    @property
    def positions_B(self) -> Tensor:
        """Int64 tokens read of each sequence."""
        return self.positions.tensor_B

    @property
    def longest(self) -> int:
        """Tokens read of the longest sequence, without asking the device."""
        return self.positions.longest

    def bytes_allocated(self) -> dict[str, int]:
        """Allocated bytes by kind, summed over layers and sequences."""
        total: dict[str, int] = {}
        for layer in self.layers:
            for kind, count in layer.bytes_allocated().items():
                total[kind] = total.get(kind, 0) + count
        return total

    def select(self, index_B: Tensor) -> None:
        """Keep only the sequences `index_B`, in that order."""
        self.positions.select(index_B)
        for layer in self.layers:
            layer.select(index_B)
