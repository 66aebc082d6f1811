"""Fused layers of the sweep against plain ones, in Triton's interpreter or on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from triton_device import DEVICE, interpreter

from ham.kernels.gated_delta_rule import gated_delta_rule_step
from ham.kernels.speed.clock import make_clock
from ham.measure.sweep.grid import UNSTRUCTURED, Cell
from ham.measure.sweep.layers import LayerSettings, RecurrentLayer
from ham.measure.sweep.ops import PLAIN, step_ops

__all__ = ["interpreter"]


def settings_of(mixer: str, fraction: float | None) -> LayerSettings:
    cell = Cell("mixer_decode", mixer, 70, 2, fraction, 16, UNSTRUCTURED)
    return LayerSettings(cell, DEVICE, torch.float32, make_clock(DEVICE), {}, step_ops(PLAIN))


@torch.inference_mode()
def test_a_fused_rule_layer_does_what_the_mixer_does(tiny_model: Any) -> None:
    from ham.measure.sweep.paged import FusedRuleLayer

    mixer = tiny_model("gated_delta_rule").to(DEVICE).blocks[0].mixer
    settings = settings_of("gated_delta_rule", None)
    plain, fused = (kind(mixer, 0, settings) for kind in (RecurrentLayer, FusedRuleLayer))
    plain.prepare()
    fused.prepare()
    fused.state_BHKV.copy_(plain.state.recurrent)
    fused.history_BWC.copy_(plain.state.history_BWC)
    for _ in range(2):
        x_BD = torch.randn(2, 32, device=DEVICE)
        torch.testing.assert_close(fused.step(x_BD), plain.step(x_BD), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fused.state_BHKV, plain.state.recurrent, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "fraction"), [("ham", 0.5), ("gated_delta_rule_window", None)])
@torch.inference_mode()
def test_a_paged_layer_does_what_the_mixer_does(
    tiny_model: Any, name: str, fraction: float | None
) -> None:
    """Attention over the counted tokens of the pages; the token itself is never counted."""
    from ham.measure.sweep.paged import PAGE_TOKENS, PagedHamLayer, PagedWindowLayer

    mixer = tiny_model(name).to(DEVICE).blocks[0].mixer
    kind = PagedHamLayer if name == "ham" else PagedWindowLayer
    layer = kind(mixer, 0, settings_of(name, fraction))
    layer.prepare()
    x_BD = torch.randn(2, 32, device=DEVICE)
    projected = mixer._project(x_BD[:, None], layer.history_BWC.clone(), 70)
    o_BHV, state_BHKV, _ = gated_delta_rule_step(
        projected.recurrent_q_BTHK[:, 0],
        projected.recurrent_k_BTHK[:, 0],
        projected.v_BTHV[:, 0],
        projected.log_decay_BTH[:, 0],
        projected.beta_BTH[:, 0],
        layer.state_BHKV.clone(),
    )
    y_BD = layer.step(x_BD)
    pages_PX = layer.storage.unflatten(0, (layer.page_count, -1))
    keys = 2 * PAGE_TOKENS * 16
    first, expected = 0, []
    for row, count in enumerate(layer.routed_B):
        own = pages_PX[first : first + count // PAGE_TOKENS + 1]
        first += len(own)
        k_HNK, v_HNV = (
            own[:, start : start + keys].unflatten(1, (2, PAGE_TOKENS, 16)).transpose(0, 1)
            for start in (0, keys)
        )
        k_HNK, v_HNV = (part.flatten(1, 2)[:, :count] for part in (k_HNK, v_HNV))
        q_H1K = projected.attention_q_BTHK[row].transpose(0, 1)
        expected.append(F.scaled_dot_product_attention(q_H1K, k_HNK, v_HNV)[:, 0])
    expected_BTD = mixer._combine(x_BD[:, None], o_BHV[:, None], torch.stack(expected)[:, None])
    torch.testing.assert_close(y_BD, expected_BTD[:, 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.state_BHKV, state_BHKV, atol=1e-5, rtol=1e-4)
    assert tuple(layer.pages.counts_R.tolist()) == layer.routed_B
    assert layer.scratch.faults_2.tolist() == [0, 0]
    if name != "ham":
        assert layer.routed_B == (24, 24) and layer.occupancy() is None
        return
    used, slots = sum(layer.routed_B), layer.occupancy().slots
    assert 0 <= slots - used <= 2 * PAGE_TOKENS
    # Keys and values, positions and the rounding of a page to 256 bytes.
    assert layer.kv_bytes() >= slots * (2 * 32 + 1) * 4


@pytest.mark.parametrize(
    ("rows", "count", "splits"), [(16, 100_000, 64), (256, 8192, 8), (1024, 8192, 2), (16, 10, 1)]
)
def test_splits_fill_the_device_without_empty_programs(rows: int, count: int, splits: int) -> None:
    from ham.measure.sweep.paged import splits_for

    assert splits_for(rows, (count,)) == splits
