"""Sequences of different lengths in one batch: each goes on exactly as it would alone."""

from __future__ import annotations

import pytest
import torch

from ham.errors import ConfigError
from ham.model.blocks import RotaryPositions
from ham.model.decoder_state import DecoderState
from ham.model.positions import Positions
from ham.model.registry import registered_mixers

MIXERS = sorted(registered_mixers())
# Shorter and longer than the window of 24, within and beyond a block of the dense cache (64).
LENGTHS = (1, 5, 5, 23, 64, 90)
NEW = 30


def texts(lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 257, (length + NEW,), generator=generator) for length in lengths]


def read(model, tokens_BT: torch.Tensor) -> DecoderState:
    state = model.init_state(tokens_BT.shape[0])
    model.prefill(tokens_BT, state)
    return state


def joined(model, tokens: list[torch.Tensor], lengths: tuple[int, ...] = LENGTHS) -> DecoderState:
    parts = zip(tokens, lengths, strict=True)
    return DecoderState.join([read(model, text[None, :n]) for text, n in parts])


def upcoming(tokens: list[torch.Tensor], lengths: tuple[int, ...], step: int) -> torch.Tensor:
    return torch.stack([text[n + step] for text, n in zip(tokens, lengths, strict=True)])


def alone(model, text: torch.Tensor, length: int) -> torch.Tensor:
    """Logits after every token from `length` on, `logits_TV`."""
    return model(text[None]).logits_BTV[0, length:]


def assert_same(found_BTV: torch.Tensor, expected: list[torch.Tensor]) -> None:
    for row_TV, expected_TV in zip(found_BTV, expected, strict=True):
        torch.testing.assert_close(row_TV, expected_TV, rtol=1e-4, atol=1e-4)
        assert torch.equal(row_TV.argmax(-1), expected_TV.argmax(-1))


@pytest.mark.parametrize("mixer", MIXERS)
def test_joined_sequences_go_on_as_each_alone(tiny_model, mixer) -> None:
    model, tokens = tiny_model(mixer), texts()
    state = joined(model, tokens)
    found = [model.step(upcoming(tokens, LENGTHS, step), state) for step in range(NEW)]
    expected = [alone(model, text, n) for text, n in zip(tokens, LENGTHS, strict=True)]
    assert_same(torch.stack(found, dim=1), expected)
    assert state.positions_B.tolist() == [n + NEW for n in LENGTHS]


@pytest.mark.parametrize("mixer", MIXERS)
def test_joined_sequences_read_several_tokens_at_once(tiny_model, mixer) -> None:
    model, tokens = tiny_model(mixer), texts()
    state = joined(model, tokens)
    cuts = ((0, 3), (3, 4), (4, NEW))
    parts = []
    for first, end in cuts:
        pieces = [text[n + first : n + end] for text, n in zip(tokens, LENGTHS, strict=True)]
        parts.append(model.prefill(torch.stack(pieces), state).logits_BTV)
    expected = [alone(model, text, n) for text, n in zip(tokens, LENGTHS, strict=True)]
    assert_same(torch.cat(parts, dim=1), expected)


@pytest.mark.parametrize("mixer", MIXERS)
def test_joins_of_joins_after_selecting_and_reordering(tiny_model, mixer) -> None:
    model, tokens = tiny_model(mixer), texts()
    first = joined(model, tokens[:4], LENGTHS[:4])
    second = joined(model, tokens[4:], LENGTHS[4:])
    for step in range(2):
        model.step(upcoming(tokens[:4], LENGTHS[:4], step), first)
        model.step(upcoming(tokens[4:], LENGTHS[4:], step), second)
    state = DecoderState.join([second, first])
    order = [5, 0, 3, 1]
    state.select(torch.tensor(order))
    rows = [[4, 5, 0, 1, 2, 3][row] for row in order]
    kept = [tokens[row] for row in rows]
    lengths = tuple(LENGTHS[row] for row in rows)
    found = [model.step(upcoming(kept, lengths, step), state) for step in range(2, NEW)]
    expected = [alone(model, text, n + 2) for text, n in zip(kept, lengths, strict=True)]
    assert_same(torch.stack(found, dim=1), expected)


@pytest.mark.parametrize("mixer", MIXERS)
def test_joining_leaves_the_parts_as_they_were(tiny_model, mixer) -> None:
    model, tokens = tiny_model(mixer), texts((9, 40))
    parts = [read(model, tokens[0][None, :9]), read(model, tokens[1][None, :40])]
    whole = DecoderState.join(parts)
    model.step(torch.tensor([1, 2]), whole)
    logits_V = model.step(tokens[0][9:10], parts[0])[0]
    torch.testing.assert_close(logits_V, alone(model, tokens[0], 9)[0], rtol=1e-4, atol=1e-4)
    assert parts[0].position == 10 and whole.positions_B.tolist() == [10, 41]


@pytest.mark.parametrize("mixer", MIXERS)
def test_equal_lengths_are_not_ragged(tiny_model, mixer) -> None:
    model, tokens = tiny_model(mixer), texts((7, 7, 12))
    state = joined(model, tokens, (7, 7, 12))
    assert isinstance(state.position, torch.Tensor) and state.longest == 12
    state.select(torch.tensor([1, 0]))
    assert state.position == 7 == state.longest
    together = read(model, torch.stack([tokens[1][:7], tokens[0][:7]]))
    assert state.bytes_allocated() == together.bytes_allocated()


@pytest.mark.parametrize("mixer", MIXERS)
def test_unfilled_slots_stay_finite(tiny_model, mixer, monkeypatch) -> None:
    """Memory that nobody wrote may hold NaN, which a mask does not keep out of a sum."""
    empty = torch.Tensor.new_empty

    def poisoned(self, *arguments, **options):
        made = empty(self, *arguments, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    model, tokens = tiny_model(mixer), texts((1, 60))
    state = joined(model, tokens, (1, 60))
    for step in range(10):
        assert model.step(upcoming(tokens, (1, 60), step), state).isfinite().all()


def test_the_longest_sequence_bounds_a_joined_batch(tiny_model) -> None:
    model = tiny_model("transformer")
    parts = [read(model, torch.zeros(1, n, dtype=torch.int64)) for n in (3, 1024)]
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
