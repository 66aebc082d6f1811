"""The HAM layer: degenerate cases that pin down its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ham.kernels.gated_delta_rule import gated_delta_rule
from ham.layer import HamMixer, HamOptions
from ham.model.mixer import MixerShape
from ham.routing import reduce_heads


def make_layer(**options) -> HamMixer:
    torch.manual_seed(0)
    return HamMixer(
        MixerShape(width=32, heads=2, max_positions=256), HamOptions(**options)
    ).double()


def make_input(batch: int = 2, length: int = 70) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, length, 32, generator=generator, dtype=torch.float64)


def test_target_zero_is_the_gated_delta_rule_with_hams_gates() -> None:
    layer, x_BTD = make_layer(target=0.0).eval(), make_input()
    parts = layer._project(x_BTD)
    memory = gated_delta_rule(
        parts.recurrent_q_BTHK,
        parts.recurrent_k_BTHK,
        parts.v_BTHV,
        parts.log_decay_BTH,
        parts.beta_BTH,
    )
    gate_BTH = layer.branch_gates(x_BTD).sigmoid()[..., :2]
    expected = layer.out((gate_BTH[..., None] * layer.recurrent_norm(memory.o_BTHV)).flatten(-2))
    torch.testing.assert_close(layer(x_BTD)[0], expected, rtol=1e-12, atol=1e-12)


def test_target_one_is_full_attention_once_the_gates_are_overridden(monkeypatch) -> None:
    layer, x_BTD = make_layer(target=1.0).eval(), make_input()
    monkeypatch.setattr(HamMixer, "_norms_attended", False)
    with torch.no_grad():
        layer.branch_gates.weight.zero_()
        layer.branch_gates.bias.copy_(torch.tensor([-1e4, -1e4, 1e4, 1e4]))
    parts = layer._project(x_BTD)
    heads_first = (
        part.transpose(1, 2)
        for part in (parts.attention_q_BTHK, parts.attention_k_BTHK, parts.v_BTHV)
    )
    attended = F.scaled_dot_product_attention(*heads_first, is_causal=True)
    expected = layer.out(attended.transpose(1, 2).flatten(-2))
    torch.testing.assert_close(layer(x_BTD)[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("score", ["cosine", "committed", "l2", "post_update"])
@pytest.mark.parametrize("reduction", ["min", "mean", "max"])
def test_the_score_uses_the_state_before_the_token(score, reduction) -> None:
    layer, x_BTD = make_layer(score=score, reduction=reduction).eval(), make_input()
    parts = layer._project(x_BTD)
    # The rolled-key trick: reading the state after token t - 1 with the key of token t.
    shifted = gated_delta_rule(
        parts.recurrent_k_BTHK.roll(-1, dims=1),
        parts.recurrent_k_BTHK,
        parts.v_BTHV,
        parts.log_decay_BTH,
        parts.beta_BTH,
        scale=1.0,
    ).o_BTHV
    prediction = torch.zeros_like(parts.v_BTHV)
    prediction[:, 1:] = shifted[:, :-1] * parts.log_decay_BTH[:, 1:, :, None].exp()
    expected = reduce_heads(layer._score_of_prediction(prediction, parts), reduction)
    torch.testing.assert_close(layer.score(x_BTD), expected, rtol=1e-9, atol=1e-9)


def test_raising_the_threshold_never_routes_more() -> None:
    layer, x_BTD = make_layer(target=0.5).eval(), make_input()
    fractions = []
    for threshold in torch.linspace(-0.1, 2.1, 23):
        layer.controller.threshold.copy_(threshold)
        fractions.append(float(layer(x_BTD)[1].routed_BT.double().mean()))
    assert fractions == sorted(fractions, reverse=True)
    assert fractions[0] == 1.0
    assert fractions[-1] == 0.0


def test_sequences_without_a_routed_token_give_no_nan() -> None:
    layer, x_BTD = make_layer(target=0.5).train(), make_input().requires_grad_()
    layer.controller.calibrate(torch.tensor([3.0]), 0.5)
    y_BTD, aux = layer(x_BTD)
    y_BTD.sum().backward()
    assert not aux.routed_BT.any()
    assert torch.isfinite(y_BTD).all()
    assert torch.isfinite(x_BTD.grad).all()


def test_positions_matter_only_with_rope() -> None:
    x_BTD = make_input(1, 40)
    for rope, same in ((True, False), (False, True)):
        layer = make_layer(target=1.0, rope=rope).eval()
        early, late = (layer._project(x_BTD, start=start) for start in (0, 100))
        assert torch.equal(early.attention_k_BTHK, late.attention_k_BTHK) is same
