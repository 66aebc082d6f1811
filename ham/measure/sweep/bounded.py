"""Decode layers whose caches stop growing: windows, a window beside a recurrence, eviction."""

from __future__ import annotations

import torch
from torch import Tensor

from ham.measure.sweep.layers import DenseLayer, Occupancy, PaddedHamLayer, Pieces


class WindowLayer(DenseLayer):
    """Sliding-window attention."""

    def _visible_keys(self, position: int) -> int:
        return min(self.mixer.options.window, position + 1)


class EvictedLayer(DenseLayer):
    """Full attention over what the evictions up to the cell's context have left.

    A step of the middle: the eviction itself, once in `interval` tokens, is not part of it, nor are
    the slots that wait for the rest of the interval.
    """

    def _visible_keys(self, position: int) -> int:
        return self.mixer.schedule.held(position) + 1

    def occupancy(self) -> Occupancy:
        """Every slot is used; says which share of the tokens is held."""
        return Occupancy((self.keys - 1,) * self.batch, self.batch * (self.keys - 1))


class PaddedWindowLayer(PaddedHamLayer):
    """The gated delta rule with a window in plain torch: HAM's step without a score."""

    def _held(self) -> tuple[Tensor, Tensor]:
        """The window without the token of the step, which always joins."""
        keys = min(self.mixer.options.window, self.settings.cell.context + 1)
        device = self.settings.device
        counts_B = torch.full((self.batch,), keys - 1, device=device)
        return counts_B, torch.ones(self.batch, dtype=torch.bool, device=device)

    def _score(self) -> None:
        """There is none."""

    def occupancy(self) -> None:
        """Every slot is used, and nothing is routed."""

    def pieces(self) -> Pieces:
        """Those of HAM but the score."""
        return {name: run for name, run in super().pieces().items() if name != "score"}
