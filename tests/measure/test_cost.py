"""Hand-worked operation counts."""

from __future__ import annotations

import pytest

from ham.measure.cost import (
    attention_flops,
    causal_pairs,
    conv_flops,
    delta_rule_flops,
    linear_flops,
    ssd_flops,
)
from ham.measure.device import PEAKS, model_flops_utilisation


def test_counts_by_hand() -> None:
    assert linear_flops(3, 4, 5) == 120
    assert conv_flops(10, 6, 4) == 480
    assert causal_pairs(4) == 10
    # Windows of 1, 2, 3, 3, 3 keys.
    assert causal_pairs(5, window=3) == 12
    assert causal_pairs(5, window=9) == causal_pairs(5)
    assert attention_flops(10, heads=2, head_dim=8, value_dim=4) == 480
    assert delta_rule_flops(2, heads=3, key_dim=4, value_dim=5) == 840
    assert ssd_flops(2, heads=3, head_dim=4, state_size=5) == 648


def test_routed_attention_costs_its_share(tiny_model) -> None:
    model = tiny_model("ham")
    none, half, full = (model.forward_flops(100, fraction) for fraction in (0.0, 0.5, 1.0))
    assert full - half == pytest.approx(half - none)
    # Two layers, 5,050 pairs, two heads of 16: scores and sum.
    assert full - none == pytest.approx(2 * attention_flops(5050, 2, 16, 16))


def test_unknown_devices_have_no_percentage() -> None:
    assert model_flops_utilisation(1e12, 1.0, "AMD EPYC") is None


def test_share_of_peak_by_hand() -> None:
    assert model_flops_utilisation(98.9e12, 0.2, "NVIDIA H100 80GB HBM3") == pytest.approx(0.5)


def test_more_than_the_peak_is_an_error() -> None:
    with pytest.raises(ValueError, match="200% of the peak"):
        model_flops_utilisation(2 * 989e12, 1.0, "NVIDIA H100 80GB HBM3")


def test_every_peak_names_its_source() -> None:
    assert all(peak.source for peak in PEAKS.values())
