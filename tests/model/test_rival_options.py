"""Options of the rivals: each passes what `test_conformance.py` asks of a mixer's defaults."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ham.baselines.transformer import Transformer, TransformerOptions
from ham.errors import ConfigError
from ham.model.decoder import DecoderLM, DecoderState
from ham.model.mixer import MixerShape
from ham.model.window_attention import banded_attention, window_pairs

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped": ("transformer", {"kv_heads": 1}),
    "conv": ("transformer", {"short_conv": 4}),
    "grouped-conv": ("transformer", {"kv_heads": 1, "short_conv": 2}),
    "sinks": ("sliding_window", {"window": 24, "sinks": 3}),
    "sinks-as-window": ("sliding_window", {"window": 5, "sinks": 5}),
}
LENGTHS = (1, 2, 30, 70)
NEW = 12


@pytest.fixture(params=VARIANTS)
def model(request, tiny_model) -> DecoderLM:
    mixer, options = VARIANTS[request.param]
    return tiny_model(mixer, dtype=torch.float64, **options)


def random_tokens(batch: int, length: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, 257, (batch, length), generator=torch.Generator().manual_seed(seed))


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cuts", [(1,), (2, 3, 40), (64, 65)], ids=str)
def test_pieces_then_steps_equal_the_parallel_form(model, cuts) -> None:
    tokens_BT = random_tokens(2, 90)
    expected = model(tokens_BT).logits_BTV
    state = model.init_state(2)
    parts = [model.prefill(x, state).logits_BTV for x in tokens_BT[:, :75].tensor_split(cuts, 1)]
    steps = [model.step(tokens_B, state)[:, None] for tokens_B in tokens_BT[:, 75:].unbind(1)]
    close(torch.cat([*parts, *steps], dim=1), expected)


def test_steps_from_the_first_token_equal_the_parallel_form(model) -> None:
    tokens_BT = random_tokens(2, 60)
    state = model.init_state(2)
    found = [model.step(tokens_B, state) for tokens_B in tokens_BT.unbind(1)]
    close(torch.stack(found, dim=1), model(tokens_BT).logits_BTV)


@pytest.mark.parametrize("pieces", [(1,) * NEW, (5, 7), (NEW,)], ids=str)
def test_joined_sequences_go_on_as_each_alone(model, pieces) -> None:
    texts = [random_tokens(1, length + NEW, seed=length) for length in LENGTHS]
    parts = []
    for text_1T, length in zip(texts, LENGTHS, strict=True):
        parts.append(model.init_state(1))
        model.prefill(text_1T[:, :length], parts[-1])
    state = DecoderState.join(parts)
    state.select(torch.tensor([3, 0, 2, 1]))
    order = [(texts[row], LENGTHS[row]) for row in (3, 0, 2, 1)]
    new_BT = torch.cat([text_1T[:, length:] for text_1T, length in order])
    found = []
    for piece_BT in new_BT.split(pieces, dim=1):
        single = piece_BT.shape[1] == 1
        found.append(
            model.step(piece_BT[:, 0], state)[:, None]
            if single
            else model.prefill(piece_BT, state).logits_BTV
        )
    expected = [model(text_1T).logits_BTV[:, length:] for text_1T, length in order]
    close(torch.cat(found, dim=1), torch.cat(expected))


@pytest.mark.parametrize("length", [1, 2, 24, 27, 28, 65])
def test_declared_bytes_are_the_allocated_ones(model, length) -> None:
    state = model.init_state(1)
    model.prefill(random_tokens(1, length), state)
    held = state.bytes_allocated()
    declared = model.state_bytes(length, 1.0, 8)
    assert declared.allocated == sum(held.values())
    assert declared.conv == held.get("conv", 0)
    assert declared.used <= declared.allocated


@pytest.mark.parametrize("changed", [0, 1, 3, 24, 40, 88])
def test_no_output_depends_on_a_later_token(model, changed) -> None:
    tokens_BT = random_tokens(1, 90)
    other_BT = tokens_BT.clone()
    other_BT[0, changed] = (other_BT[0, changed] + 7) % 256
    before, after = model(tokens_BT).logits_BTV, model(other_BT).logits_BTV
    assert torch.equal(before[:, :changed], after[:, :changed])
    assert not torch.equal(before[:, changed], after[:, changed])


def test_every_parameter_gets_a_finite_gradient(model) -> None:
    tokens_BT = random_tokens(2, 65)
    loss, _ = model.train().loss(tokens_BT[:, :-1], tokens_BT[:, 1:])
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


def test_grouped_queries_are_full_heads_with_equal_keys_and_values() -> None:
    shape = MixerShape(width=32, heads=4)
    grouped = Transformer(shape, TransformerOptions(kv_heads=2)).double()
    full = Transformer(shape, TransformerOptions()).double()
    q, k, v = grouped.qkv.weight.detach().split((32, 16, 16))
    # Query heads 0 and 1 read key head 0, heads 2 and 3 read key head 1.
    k, v = (x.unflatten(0, (2, 8)).repeat_interleave(2, dim=0).flatten(0, 1) for x in (k, v))
    full.qkv.weight.data = torch.cat((q, k, v))
    full.out.load_state_dict(grouped.out.state_dict())
    x_BTD = torch.randn(2, 50, 32, dtype=torch.float64)
    expected = full(x_BTD)[0]
    close(grouped(x_BTD)[0], expected)
    state = grouped.init_state(2, x_BTD.device, x_BTD.dtype)
    pieces = [grouped.prefill(x, state)[0] for x in x_BTD[:, :40].split((30, 10), dim=1)]
    steps = [grouped.step(x_BD, state)[:, None] for x_BD in x_BTD[:, 40:].unbind(1)]
    close(torch.cat([*pieces, *steps], dim=1), expected)
    assert grouped.state_bytes(50).kv == 50 * 2 * 16 * 2 == full.state_bytes(50).kv // 2
    # Per token, the projections of two heads of keys and two of values.
    assert full.forward_flops(50) - grouped.forward_flops(50) == 2 * 50 * 32 * 32


def test_a_convolution_that_passes_its_input_changes_nothing(tiny_model) -> None:
    convolved = tiny_model("transformer", dtype=torch.float64, short_conv=3)
    plain = tiny_model("transformer", dtype=torch.float64)
    for block in convolved.blocks:
        weight_WC = block.mixer.conv.weight_WC
        weight_WC.data.zero_()
        weight_WC.data[-1] = 1.0
    weights = convolved.state_dict()
    plain.load_state_dict({name: w for name, w in weights.items() if ".conv." not in name})
    tokens_BT = random_tokens(2, 50)
    close(convolved(tokens_BT).logits_BTV, plain(tokens_BT).logits_BTV)
    assert convolved.forward_flops(50) - plain.forward_flops(50) == 2 * 50 * 2 * 96 * 3
    assert convolved.state_bytes(50, 1.0, 8).conv == 2 * 2 * 96 * 8


def test_the_convolution_reaches_back_over_its_width(tiny_model) -> None:
    """Seen in the first key alone: token 0 of a later key, through the convolution only."""
    mixer = tiny_model("transformer", dtype=torch.float64, short_conv=3).blocks[0].mixer
    x_BTD = torch.randn(1, 6, 32, dtype=torch.float64)
    changed_BTD = x_BTD.clone()
    changed_BTD[:, 0] += 1.0
    before, after = mixer._project(x_BTD, 0)[1], mixer._project(changed_BTD, 0)[1]
    moved = (before != after).any(-1).any(-1)[0]
    assert moved.tolist() == [True, True, True, False, False, False]


@pytest.mark.parametrize(("window", "sinks"), [(24, 3), (5, 5), (7, 1), (64, 4), (4, 0)])
def test_first_tokens_and_window_are_what_a_mask_says(window, sinks) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 50, 8, generator=generator, dtype=torch.float64)
    t, j = torch.arange(50)[:, None], torch.arange(50)
    visible = (j <= t) & ((j > t - window) | (j < sinks))
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2)
    found = banded_attention(*(x.transpose(1, 2) for x in (q, k, v)), window, sinks)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert window_pairs(50, window, sinks) == visible.sum()


def test_sinks_cost_what_they_hold(tiny_model) -> None:
    plain, sinks = (tiny_model("sliding_window", window=24, sinks=n) for n in (0, 4))
    pair = 2 * 2 * 32 * 4
    assert sinks.state_bytes(60, 1.0, 4).kv - plain.state_bytes(60, 1.0, 4).kv == 4 * pair
    assert sinks.state_bytes(20, 1.0, 4).kv == plain.state_bytes(20, 1.0, 4).kv == 20 * pair
    assert sinks.decode_flops(60) - plain.decode_flops(60) == 2 * 2 * 4 * 2 * (16 + 16)
    assert sinks.decode_flops(20) == plain.decode_flops(20)


def test_options_out_of_range_are_one_clear_message(tiny_model) -> None:
    with pytest.raises(ConfigError, match="kv_heads 3 does not divide the 2 heads"):
        tiny_model("transformer", kv_heads=3)
    with pytest.raises(ConfigError, match="kv_heads"):
        tiny_model("transformer", kv_heads=0)
    with pytest.raises(ConfigError, match=r"sinks 9 are more than the window; legal: 0\.\.8"):
        tiny_model("sliding_window", window=8, sinks=9)
    with pytest.raises(ConfigError, match=r"context 128; legal: sinks 0\.\.8"):
        tiny_model("sliding_window", window=120, sinks=9)
