"""What every registered mixer must do; a new baseline is covered by being registered."""

from __future__ import annotations

import pytest
import torch

from ham.model.registry import registered_mixers

MIXERS = sorted(registered_mixers())
ROUTED = [name for name, mixer in registered_mixers().items() if mixer.routes]


def random_tokens(batch: int, length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, 257, (batch, length), generator=torch.Generator().manual_seed(seed))


def test_the_architectures_are_registered() -> None:
    recurrent = {"gated_delta_rule", "gated_delta_rule_window", "mamba2"}
    assert {"ham", "transformer", "sliding_window", *recurrent} <= set(MIXERS)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("cuts", [(1,), (70,), (64, 65), (1, 2, 3, 90)], ids=str)
def test_chunked_prefill_equals_the_parallel_form(tiny_model, mixer, cuts) -> None:
    model = tiny_model(mixer, dtype=torch.float64)
    tokens_BT = random_tokens(2, 101)
    expected = model(tokens_BT)
    state = model.init_state(2)
    parts = [model.prefill(part, state) for part in tokens_BT.tensor_split(cuts, dim=1)]
    found = torch.cat([part.logits_BTV for part in parts], dim=1)
    torch.testing.assert_close(found, expected.logits_BTV, rtol=1e-9, atol=1e-9)
    for layer, aux in enumerate(expected.aux):
        if aux.routed_BT is not None:
            routed = torch.cat([part.aux[layer].routed_BT for part in parts], dim=1)
            assert torch.equal(routed, aux.routed_BT)


@pytest.mark.parametrize("mixer", MIXERS)
def test_step_by_step_equals_the_parallel_form(tiny_model, mixer) -> None:
    model = tiny_model(mixer, dtype=torch.float64)
    tokens_BT = random_tokens(3, 80)
    expected = model(tokens_BT).logits_BTV
    state = model.init_state(3)
    found = torch.stack([model.step(tokens_B, state) for tokens_B in tokens_BT.unbind(1)], dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("changed", [0, 1, 40, 63, 64, 98])
def test_no_output_depends_on_a_later_token(tiny_model, mixer, changed) -> None:
    model = tiny_model(mixer, dtype=torch.float64)
    tokens_BT = random_tokens(1, 99)
    other_BT = tokens_BT.clone()
    other_BT[0, changed] = (other_BT[0, changed] + 7) % 256
    before, after = model(tokens_BT).logits_BTV, model(other_BT).logits_BTV
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed], after[:, changed])


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_sequence_does_not_depend_on_its_batch(tiny_model, mixer) -> None:
    model = tiny_model(mixer, dtype=torch.float64)
    tokens_BT = random_tokens(4, 50)
    together = model(tokens_BT).logits_BTV
    alone = torch.cat([model(row[None]).logits_BTV for row in tokens_BT])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mixer", MIXERS)
def test_every_parameter_gets_a_finite_gradient(tiny_model, mixer) -> None:
    model = tiny_model(mixer).train()
    tokens_BT = random_tokens(2, 65)
    loss, _ = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_declared_bytes_are_the_allocated_ones(tiny_model, mixer, length, dtype) -> None:
    model = tiny_model(mixer, dtype=dtype)
    state = model.init_state(1)
    output = model.prefill(random_tokens(1, length), state)
    held = state.bytes_allocated()
    size = torch.finfo(dtype).bits // 8
    declared = model.state_bytes(length, output.cache_fractions() or 1.0, size)
    assert declared.allocated == sum(held.values())
    assert declared.recurrent == held.get("recurrent", 0)
    assert declared.conv == held.get("conv", 0)
    assert declared.used <= declared.allocated
    assert declared.kv <= held.get("kv", 0)


@pytest.mark.parametrize("mixer", MIXERS)
def test_reordering_a_batch_keeps_each_memory(tiny_model, mixer) -> None:
    model = tiny_model(mixer, dtype=torch.float64)
    tokens_BT = random_tokens(3, 70)
    order = torch.tensor([2, 0, 2])
    state = model.init_state(3)
    model.prefill(tokens_BT[:, :60], state)
    state.select(order)
    found = [model.step(tokens_B, state) for tokens_B in tokens_BT[order, 60:].unbind(1)]
    expected = model(tokens_BT[order]).logits_BTV[:, 60:]
    torch.testing.assert_close(torch.stack(found, 1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mixer", MIXERS)
def test_bfloat16_autocast_runs_and_stays_close(tiny_model, mixer) -> None:
    model = tiny_model(mixer, **({"target": 1.0} if mixer in ROUTED else {})).train()
    tokens_BT = random_tokens(2, 65)
    exact, _ = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
    loss.backward()
    assert abs(float(loss.detach() - exact.detach())) < 0.02 * float(exact.detach())


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_few_steps_learn_a_repeated_sequence(tiny_model, mixer) -> None:
    model = tiny_model(mixer).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    tokens_BT = random_tokens(1, 40).repeat(4, 2)
    losses = []
    for _ in range(60):
        loss, _ = model.loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        model.end_step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("mixer", MIXERS)
def test_cost_methods_are_positive_and_grow_with_the_context(tiny_model, mixer) -> None:
    model = tiny_model(mixer)
    assert 0 < model.forward_flops(64) < model.forward_flops(128)
    assert 0 < model.decode_flops(1) <= model.decode_flops(512)
    parameters = model.count_parameters()
    # The projections alone cost two FLOPs per weight and token.
    assert model.forward_flops(128) >= 1.5 * parameters * 128


@pytest.mark.parametrize("mixer", ROUTED)
@pytest.mark.parametrize("target", [0.0, 1.0])
def test_ends_of_the_dial_are_exact(tiny_model, mixer, target) -> None:
    model = tiny_model(mixer, target=target)
    output = model(random_tokens(2, 90))
    assert output.kv_fraction_per_layer() == [target, target]
