"""How far each sequence of a batch has been read.

Sequences that were prefilled together stand at the same position, and everything is simplest and
fastest then: a position is one number, no mask is needed. Sequences that were joined into one batch
stand at different positions. The lengths are also kept on the host, so that asking for the longest
never waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Positions:
    """Number of tokens read, per sequence.

    Attributes:
        lengths: The numbers, on the host.
        device: Where `tensor_B` is.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device):
        self.lengths = list(lengths)
        self.device = device
        self._ragged_B: Tensor | None = None
        self._renew()

    @classmethod
    def zeros(cls, batch_size: int, device: torch.device) -> Positions:
        """Positions of sequences that nobody has read yet."""
        return cls([0] * batch_size, device)

    @classmethod
    def join(cls, parts: Sequence[Positions]) -> Positions:
        """Positions of the concatenated batches."""
        lengths = [length for part in parts for length in part.lengths]
        return cls(lengths, parts[0].device)

    @property
    def value(self) -> int | Tensor:
        """One int while all sequences stand at the same position, else int64 `[B]`.

        The tensor is advanced in place: copy it to keep it.
        """
        return self.longest if self._ragged_B is None else self._ragged_B

    @property
    def tensor_B(self) -> Tensor:
        """Int64 position of each sequence, whether they are equal or not."""
        if self._ragged_B is not None:
            return self._ragged_B
        shape = (len(self.lengths),)
        return torch.full(shape, self.longest, dtype=torch.int64, device=self.device)

    @property
    def longest(self) -> int:
        """The largest, 0 of an empty batch; known on the host."""
        return max(self.lengths, default=0)

    @property
    def shortest(self) -> int:
        """The smallest, 0 of an empty batch; known on the host."""
        return min(self.lengths, default=0)

    @property
    def ragged(self) -> bool:
        """Whether sequences stand at different positions."""
        return self._ragged_B is not None

    def upcoming(self, tokens: int) -> Tensor:
        """Int64 positions of the next `tokens` tokens, `[B, T]`; `[1, T]` unless ragged."""
        return span(self.value, tokens, self.device)

    def advance(self, tokens: int) -> None:
        """`tokens` more were read of every sequence."""
        self.lengths = [length + tokens for length in self.lengths]
        if self._ragged_B is not None:
            self._ragged_B += tokens

    def select(self, index_B: Tensor) -> None:
        """Keep the sequences `index_B`, in that order."""
        if self.ragged:
            self.lengths = [self.lengths[row] for row in index_B.tolist()]
        else:
            self.lengths = [self.longest] * index_B.numel()
        self._renew()

    def _renew(self) -> None:
        equal = len(set(self.lengths)) <= 1
        self._ragged_B = None if equal else torch.tensor(self.lengths, device=self.device)


def span(start: int | Tensor, tokens: int, device: torch.device) -> Tensor:
    """Int64 positions of `tokens` tokens from `start` on: `[1, T]`, or `[B, T]` for `start_B`."""
    steps_T = torch.arange(tokens, device=device)
    return (start + steps_T)[None] if isinstance(start, int) else start[:, None] + steps_T
