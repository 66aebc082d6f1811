"""HAM and the gated delta rule with a window differ in the routing alone."""

from __future__ import annotations

import torch

from ham.model.decoder import DecoderLM

WINDOW = 7


def pair(tiny_model) -> tuple[DecoderLM, DecoderLM]:
    """The same weights as HAM that routes nothing beside its window, and as the rival."""
    ham = tiny_model("ham", dtype=torch.float64, target=0.0, window=WINDOW)
    rival = tiny_model("gated_delta_rule_window", dtype=torch.float64, window=WINDOW)
    # Gains and biases start equal, and would hide which branch they belong to.
    for parameter in ham.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    rival_names = set(rival.state_dict())
    rival.load_state_dict({n: w for n, w in ham.state_dict().items() if n in rival_names})
    return ham, rival


def test_ham_that_keeps_the_window_only_is_this_rival(tiny_model) -> None:
    ham, rival = pair(tiny_model)
    tokens_BT = torch.randint(0, 257, (2, 60), generator=torch.Generator().manual_seed(0))
    found, expected = rival(tokens_BT).logits_BTV, ham(tokens_BT).logits_BTV
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert rival.count_parameters() == ham.count_parameters()


def test_both_cost_the_same(tiny_model) -> None:
    ham, rival = pair(tiny_model)
    assert rival.forward_flops(60) == ham.forward_flops(60, 0.0)
    assert rival.decode_flops(60) == ham.decode_flops(60, 0.0)
    declared, other = rival.state_bytes(60, 1.0, 8), ham.state_bytes(60, 0.0, 8)
    assert declared.recurrent == other.recurrent and declared.conv == other.conv
    # HAM's ring has a slot less: its query's own token is at hand.
    assert declared.kv == 2 * WINDOW * 2 * 32 * 8


def test_without_positions_the_rotation_is_gone(tiny_model) -> None:
    rival = tiny_model("gated_delta_rule_window", window=WINDOW, rope=False)
    assert rival.blocks[0].mixer.rotary is None
    state = rival.init_state(1)
    tokens_BT = torch.arange(20)[None]
    steps = [rival.step(tokens_B, state) for tokens_B in tokens_BT.unbind(1)]
    expected = rival(tokens_BT).logits_BTV
    torch.testing.assert_close(torch.stack(steps, dim=1), expected, rtol=1e-4, atol=1e-4)
