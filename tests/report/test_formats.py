from __future__ import annotations

import pytest

from ham.report import formats
from ham.report.aggregate import Cell
from ham.report.statistics import Estimate


@pytest.mark.parametrize(
    ("write", "value", "expected"),
    [
        (formats.bits, 2.30449, "2.304"),
        (formats.signed_bits, -0.0312, "−0.031"),
        (formats.signed_bits, 0.5, "+0.500"),
        (formats.share, 0.2485, "24.9 %"),
        (formats.significant, 0.01234, "0.0123"),
        (formats.significant, 12345.6, "12,346"),
        (formats.significant, 0.0, "0"),
        (formats.count, 36595.7, "36,596"),
        (formats.parameters, 644_352, "0.644 M"),
        (formats.parameters, 7.1e9, "7.100 B"),
        (formats.byte_size, 512, "512 B"),
        (formats.byte_size, 1536, "1.50 KiB"),
        (formats.byte_size, 3 * 2**30, "3.00 GiB"),
        (formats.short_rate, 20000.0, "20k"),
        (formats.short_bytes, 2**19, "512 KiB"),
    ],
)
def test_numbers(write, value, expected):
    assert write(value) == expected


def test_lengths_on_an_axis():
    short, long = [128, 256, 1024], [512, 8192, 65536]
    assert [formats.token_labels(short)(x) for x in short] == ["128", "256", "1,024"]
    assert [formats.token_labels(long)(x) for x in long] == ["512", "8k", "64k"]
    assert formats.token_unit(short) == "tokens"
    assert formats.token_unit(long) == "tokens, k = 1,024"


def cell(**fields) -> Cell:
    return Cell(Estimate(**fields))


def test_spread_shares_unit_and_decimals_with_its_value():
    seeds = cell(value=36820.0, n=3, low=36000.0, high=37640.0, interval="t95")
    assert formats.cell_text(seeds, formats.count) == "36,820 ± 820 (n=3)"
    small = cell(value=0.632, n=3, low=0.62808, high=0.63592, interval="t95")
    assert formats.cell_text(small, formats.significant) == "0.632 ± 0.004 (n=3)"
    size = cell(value=2.5 * 2**20, n=2, low=2.4 * 2**20, high=2.6 * 2**20, interval="t95")
    assert formats.cell_text(size, formats.byte_size) == "2.50 MiB ± 0.10 MiB (n=2)"


def test_one_run_shows_its_own_interval_and_n():
    run = cell(value=0.8, n=1, low=0.49, high=0.943, interval="wilson95")
    assert formats.cell_text(run, formats.share) == "80.0 % [49.0, 94.3] (n=1)"
    assert formats.cell_text(cell(value=0.8, n=1), formats.share) == "80.0 % (n=1)"


def test_failed_partial_and_missing():
    assert formats.cell_text(Cell(None, ("ValueError: bad\ntrace",)), formats.bits) == (
        "failed: ValueError: bad"
    )
    assert formats.cell_text(Cell(None), formats.bits) == "not run"
    partial = Cell(Estimate(1.0, 2), ("E: x",))
    assert formats.cell_text(partial, formats.bits) == "1.000 (n=2; 1 failed)"


def test_long_reasons_are_cut():
    assert formats.reason("x" * 100) == "x" * 59 + "…"


@pytest.mark.parametrize(
    ("words", "expected"),
    [([], ""), (["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c")],
)
def test_join_words(words, expected):
    assert formats.join_words(words) == expected


@pytest.mark.parametrize(
    ("value", "like", "text"),
    [
        (7.4718e15, None, "7.47 × 10^15"),
        (2e14, 1.7362e16, "0.02 × 10^16"),
        (2112.0, None, "2,112"),
        (0.25, None, "0.250"),
        (0.0, None, "0"),
        (float("inf"), None, "inf"),
    ],
)
def test_numbers_beyond_a_million_are_powers_of_ten(value, like, text):
    assert formats.scientific(value, like) == text


def test_differences_of_shares_are_points():
    assert formats.points(0.312) == "+31.2" and formats.points(-0.014) == "−1.4"
