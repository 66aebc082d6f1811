"""Sequences of different lengths in one batch, beyond the rules that every mixer keeps.

Those are in `ham.conformance.ragged`.
"""

from __future__ import annotations

import pytest
import torch

from ham.errors import ConfigError
from ham.model.blocks import RotaryPositions
from ham.model.decoder_state import DecoderState
from ham.model.positions import Positions


def test_the_longest_sequence_bounds_a_joined_batch(tiny_model) -> None:
    model = tiny_model("transformer")
    parts = []
    for length in (3, 1024):
        parts.append(model.init_state(1))
        model.prefill(torch.zeros(1, length, dtype=torch.int64), parts[-1])
    with pytest.raises(ConfigError, match=r"1025 tokens.*max_positions 1024"):
        model.step(torch.zeros(2, dtype=torch.int64), DecoderState.join(parts))


def test_positions() -> None:
    device = torch.device("cpu")
    positions = Positions.join([Positions([4, 4], device), Positions([9], device)])
    assert positions.ragged and (positions.shortest, positions.longest) == (4, 9)
    positions.advance(2)
    assert positions.value.tolist() == [6, 6, 11] and positions.value.dtype == torch.int64
    assert positions.upcoming(2).tolist() == [[6, 7], [6, 7], [11, 12]]
    positions.select(torch.tensor([2, 2]))
    assert positions.value == 11 and positions.tensor_B.tolist() == [11, 11]
    assert positions.upcoming(2).tolist() == [[11, 12]]
    positions.select(torch.tensor([], dtype=torch.int64))
    assert positions.lengths == [] and positions.longest == 0


def test_rotary_positions_of_each_sequence() -> None:
    rotary = RotaryPositions(8, 32)
    x_BTHK = torch.randn(3, 4, 2, 8, generator=torch.Generator().manual_seed(0))
    starts = torch.tensor([0, 7, 28])
    apart = [rotary(x_BTHK[row : row + 1], int(start)) for row, start in enumerate(starts)]
    assert torch.equal(rotary(x_BTHK, starts), torch.cat(apart))
