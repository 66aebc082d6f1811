"""The fused decoder beside the model's own step: logits, caches, places, faults."""

from __future__ import annotations

import pytest
import torch
from triton_device import DEVICE, interpreter, needs_gpu

from ham.decoding.stepper import EagerStepper, make_stepper
from ham.errors import ConfigError, NotFiniteError
from ham.model.decoder import DecoderLM
from ham.model.decoder_state import DecoderState

__all__ = ["interpreter", "needs_gpu"]

LENGTHS = (1, 37)
STEPS = 4
# The others of the state differ within one kernel only, which has tests of its own.
SCORES = ("cosine", "committed", "learned", "random", "periodic")


def texts(count: int = len(LENGTHS)) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 257, (80,), generator=generator).to(DEVICE) for _ in range(count)]


def prefilled(model: DecoderLM) -> DecoderState:
    parts = []
    for text, length in zip(texts(), LENGTHS, strict=True):
        parts.append(model.init_state(1))
        model.prefill(text[None, :length], parts[-1])
    return DecoderState.join(parts)


def tokens_at(step: int, places: tuple[int, ...] = (0, 1)) -> torch.Tensor:
    return torch.stack([texts()[place][LENGTHS[place] + step] for place in places])


@torch.no_grad()
def run_both(model: DecoderLM, steps: int = STEPS):
    fused = make_stepper(model, prefilled(model), fused=True)
    plain = EagerStepper(model, prefilled(model))
    for step in range(steps):
        expected_BV = plain.step(tokens_at(step))
        torch.testing.assert_close(fused.step(tokens_at(step)), expected_BV, rtol=1e-4, atol=1e-4)
    return fused, plain


@pytest.mark.parametrize("score", SCORES)
def test_steps_agree_with_the_model(tiny_model, score) -> None:
    fused, plain = run_both(tiny_model("ham", score=score).to(DEVICE))
    everyone = range(len(LENGTHS))
    assert fused.kept(everyone) == plain.kept(everyone)
    assert sum(fused.kept(everyone).values()) > 0
    fused.check()


@pytest.mark.parametrize("reduction", ["mean", "max", "per_head"])
def test_reductions_agree_with_the_model(tiny_model, reduction) -> None:
    fused, plain = run_both(tiny_model("ham", reduction=reduction).to(DEVICE))
    everyone = range(len(LENGTHS))
    assert fused.kept(everyone) == plain.kept(everyone)


@pytest.mark.parametrize("target", [0.0, 1.0])
def test_the_ends_of_the_dial(tiny_model, target) -> None:
    fused, plain = run_both(tiny_model("ham", target=target).to(DEVICE), steps=2)
    assert fused.kept(range(len(LENGTHS))) == plain.kept(range(len(LENGTHS)))


def test_the_gated_delta_rule_has_no_cache(tiny_model) -> None:
    fused, _ = run_both(tiny_model("gated_delta_rule").to(DEVICE))
    assert fused.kept(range(len(LENGTHS))) == {}
    assert set(fused.bytes_allocated()) == {"recurrent", "conv"}


@torch.no_grad()
def test_sequences_leave_and_the_state_comes_back(tiny_model) -> None:
    model = tiny_model("ham").to(DEVICE)
    fused, plain = run_both(model, steps=2)
    fused.select([1])
    plain.select([1])
    for step in range(2, 4):
        tokens_B = tokens_at(step, (1,))
        torch.testing.assert_close(fused.step(tokens_B), plain.step(tokens_B), rtol=1e-4, atol=1e-4)
    state = fused.release()
    assert state.positions.lengths == plain.lengths
    tokens_B = tokens_at(4, (1,))
    torch.testing.assert_close(
        model.step(tokens_B, state), plain.step(tokens_B), rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_pages_are_taken_as_tokens_are_routed(tiny_model) -> None:
    model = tiny_model("ham", target=1.0).to(DEVICE)
    state = model.init_state(1)
    text_T = texts()[0]
    model.prefill(text_T[None, :30], state)
    fused = make_stepper(model, state, fused=True)
    before = fused.bytes_allocated()["kv"]
    for token_1 in text_T[30:34].split(1):
        fused.step(token_1)
    assert fused.bytes_allocated()["kv"] == 2 * before
    assert fused.kept([0]) == {0: 34, 1: 34}


def test_a_nan_score_is_told(tiny_model) -> None:
    model = tiny_model("ham").to(DEVICE)
    state = prefilled(model)
    state.layers[1].recurrent_BHKV.fill_(float("nan"))
    fused = make_stepper(model, state, fused=True)
    fused.step(tokens_at(0))
    with pytest.raises(NotFiniteError, match="scores were NaN"):
        fused.check()


@pytest.mark.parametrize(
    ("mixer", "options", "message"),
    [
        ("transformer", {}, "mixer 'transformer' has no fused step"),
        ("ham", {"window": 4}, "window has no fused step"),
        ("ham", {"budget": "bounded", "slots": 8}, "budget 'bounded' has no fused step"),
    ],
)
def test_what_has_no_fused_step_says_so(tiny_model, mixer, options, message) -> None:
    model = tiny_model(mixer, **options).to(DEVICE)
    with pytest.raises(ConfigError, match=message):
        make_stepper(model, model.init_state(1), fused=True)
    assert isinstance(make_stepper(model, model.init_state(1)), EagerStepper)


@torch.no_grad()
def test_half_precision_beside_weights_of_full_precision(tiny_model) -> None:
    # As autocast has it: residual stream in the dtype of the weights, all else in float16.
    model = tiny_model("ham").to(DEVICE)
    with torch.autocast(DEVICE.type, dtype=torch.float16):
        fused = make_stepper(model, prefilled(model), fused=True)
        plain = EagerStepper(model, prefilled(model))
        for step in range(2):
            logits_BV, expected_BV = (one.step(tokens_at(step)) for one in (fused, plain))
            assert logits_BV.dtype == expected_BV.dtype == torch.float16
            torch.testing.assert_close(logits_BV, expected_BV, rtol=0, atol=1e-2)
