"""The HAM layer with each budget and switch, as a part of a model."""

from __future__ import annotations

import pytest
import torch

from ham.layer import HamMixer, HamOptions
from ham.model.mixer import MixerShape

VARIANTS = {
    "window": {"window": 7},
    "self": {"self_visible": True},
    "learned-sink": {"sink": "learned"},
    "zero-sink": {"sink": "zero", "window": 2},
    "bounded": {"budget": "bounded", "slots": 9},
    "bounded-all": {"budget": "bounded", "slots": 9, "window": 4, "sink": "learned"},
    "chunk": {"budget": "chunk_topk", "chunk": 16, "top_k": 3},
    "chunk-all": {"budget": "chunk_topk", "chunk": 16, "top_k": 3, "window": 4, "sink": "learned"},
}


def random_tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 257, (batch, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_trains_and_every_parameter_learns(tiny_model, variant) -> None:
    model = tiny_model("ham", **VARIANTS[variant]).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens_BT = random_tokens(1, 40).repeat(4, 2)
    losses = []
    for step in range(30):
        loss, output = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
        loss.backward()
        if step == 0:
            for name, parameter in model.named_parameters():
                assert torch.isfinite(parameter.grad).all(), name
                assert parameter.grad.abs().max() > 0, name
        optimiser.step()
        optimiser.zero_grad()
        model.end_step()
        losses.append(float(loss.detach()))
        assert 0 < output.kv_fraction() < 1
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_pieces_and_steps_give_the_parallel_form(tiny_model, variant) -> None:
    model = tiny_model("ham", dtype=torch.float64, **VARIANTS[variant])
    tokens_BT = random_tokens(2, 60)
    expected = model(tokens_BT).logits_BTV
    state = model.init_state(2)
    parts = [model.prefill(part, state).logits_BTV for part in tokens_BT[:, :50].split(23, 1)]
    steps = [model.step(tokens_B, state)[:, None] for tokens_B in tokens_BT[:, 50:].unbind(1)]
    found = torch.cat([*parts, *steps], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_declared_bytes_are_the_allocated_ones(tiny_model, variant) -> None:
    model = tiny_model("ham", **VARIANTS[variant])
    for length in (1, 33, 100):
        state = model.init_state(1)
        output = model.prefill(random_tokens(1, length), state)
        declared = model.state_bytes(length, output.kv_fraction_per_layer(), 4)
        assert declared.allocated == sum(state.bytes_allocated().values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_dict_survives_saving(tiny_model, variant) -> None:
    first = tiny_model("ham", **VARIANTS[variant])
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    second = tiny_model("ham", seed=1, **VARIANTS[variant])
    second.load_state_dict(first.state_dict())
    tokens_BT = random_tokens(1, 40)
    assert torch.equal(first(tokens_BT).logits_BTV, second(tokens_BT).logits_BTV)


@pytest.mark.parametrize("budget", ["threshold", "bounded"])
def test_a_sink_changes_how_much_the_branch_adds(budget) -> None:
    torch.manual_seed(0)
    slots = {"slots": 8} if budget == "bounded" else {}
    options = HamOptions(budget=budget, target=1.0, sink="learned", **slots)
    layer = HamMixer(MixerShape(width=32, heads=2), options).double().eval()
    x_BTD = torch.randn(1, 30, 32, dtype=torch.float64)
    before = layer(x_BTD)[0]
    with torch.no_grad():
        layer.store.sink_HK.normal_(std=3.0)
    moved = (layer(x_BTD)[0] - before).norm() / before.norm()
    assert moved > 0.05
    # All the weight on the null key leaves the recurrent branch alone.
    with torch.no_grad():
        layer.q_norm.weight.zero_()
        layer.q_norm.weight[0] = 1e4
        layer.rotary = None
        parts = layer._project(x_BTD)
        sign_H = parts.attention_q_BTHK[0, 5, :, 0].sign()
        layer.store.sink_HK.zero_()
        layer.store.sink_HK[:, 0] = 1e4 * sign_H
    alone, _ = layer(x_BTD)
    with torch.no_grad():
        layer.branch_gates.weight[2:] = 0.0
        layer.branch_gates.bias[2:] = -1e4
    torch.testing.assert_close(alone[0, 5], layer(x_BTD)[0][0, 5], rtol=1e-9, atol=1e-9)
