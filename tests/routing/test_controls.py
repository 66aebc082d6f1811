"""Scores that do not look at the state: the hash and the periodic mask."""

from __future__ import annotations

import pytest
import torch

from ham.routing.controls import hash_uniform, periodic_mask, positions

MASK = 0xFFFFFFFF


def murmur_chain(*values: int) -> float:
    """The same hash in Python integers of any size."""
    state = 0
    for value in values:
        x = (state + value * 0x9E3779B9) & MASK
        x ^= x >> 16
        x = x * 0x85EBCA6B & MASK
        x ^= x >> 13
        x = x * 0xC2B2AE35 & MASK
        state = x ^ (x >> 16)
    return (state >> 8) / 2**24


def test_the_hash_equals_exact_integer_arithmetic() -> None:
    position = torch.tensor([0, 1, 2, 1000, 2**31 - 1, 2**40])
    row = torch.tensor([[0], [7]])
    found = hash_uniform((1, 5, 3), row, position)
    assert found.dtype == torch.float32
    for b, index in enumerate((0, 7)):
        expected = [murmur_chain(1, 5, 3, index, int(t)) for t in position]
        assert found[b].tolist() == expected


def test_the_hash_is_uniform_and_streams_are_independent() -> None:
    position = torch.arange(100_000)
    rows = torch.stack([hash_uniform((1, seed, 0), position) for seed in range(4)]).double()
    assert rows.min() >= 0 and rows.max() < 1
    # Standard errors of a mean and of a correlation over 1e5 numbers: 0.0009 and 0.0032.
    assert (rows.mean(1) - 0.5).abs().max() < 0.004
    correlation = torch.corrcoef(torch.cat([rows, rows[:1].roll(1, 1)]))
    assert (correlation - torch.eye(5)).abs().max() < 0.014
    counts = torch.histc(rows[0], bins=50, min=0, max=1)
    assert (counts - 2000).abs().max() < 5 * 2000**0.5


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.3, 1 / 3, 0.9, 1.0])
def test_periodic_routes_every_one_over_f_th_token(fraction) -> None:
    mask = periodic_mask(torch.tensor(fraction, dtype=torch.float64), torch.arange(3000))
    count = mask.cumsum(0)
    exact = torch.arange(1, 3001) * torch.tensor(fraction, dtype=torch.float64)
    assert ((count - exact).abs() < 1 + 1e-9).all()
    gaps = mask.nonzero()[:, 0].diff()
    if fraction:
        assert set(gaps.tolist()) <= {int(1 // fraction), int(-(-1 // fraction))}


def test_positions_of_sequences_that_start_together_or_apart() -> None:
    assert positions(3, 2, torch.device("cpu")).tolist() == [[3, 4]]
    apart = positions(torch.tensor([0, 5]), 3, torch.device("cpu"))
    assert apart.tolist() == [[0, 1, 2], [5, 6, 7]]
