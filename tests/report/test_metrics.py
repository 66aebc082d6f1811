from __future__ import annotations

import pytest

from ham.errors import ConfigError
from ham.report.metrics import CLAIMABLE, better_direction, unit


def test_every_metric_of_claims_has_a_direction_and_a_unit():
    assert {better_direction(metric) for metric in CLAIMABLE} == {"higher", "lower"}
    assert all(unit(metric) for metric in CLAIMABLE)


@pytest.mark.parametrize(
    ("metric", "direction", "name"),
    [
        ("accuracy", "higher", "share"),
        ("tokens_per_second", "higher", "per s"),
        ("wall_seconds", "lower", "s"),
        ("cache_bytes_allocated", "lower", "bytes"),
        ("training_flops", "lower", "FLOPs"),
        ("bits_per_byte", "lower", "bits per byte"),
    ],
)
def test_directions_and_units(metric: str, direction: str, name: str):
    assert (better_direction(metric), unit(metric)) == (direction, name)


def test_a_metric_without_a_better_side_is_refused():
    with pytest.raises(ConfigError, match="unknown metric 'threshold'; known: accuracy"):
        unit("threshold")
