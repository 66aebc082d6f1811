"""Both ends of HAM's dial are exact: the gated delta rule, and softmax attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ham.kernels.gated_delta_rule.reference import reference
from ham.layer import HamMixer, HamOptions
from ham.model.mixer import MixerShape, RoutingHints

WIDTH, HEADS, LENGTH, VOCABULARY = 32, 2, 75, 64


def make_layer(**options) -> HamMixer:
    torch.manual_seed(0)
    shape = MixerShape(WIDTH, HEADS, max_positions=256, vocabulary_size=VOCABULARY)
    layer = HamMixer(shape, HamOptions(**options)).eval()
    if layer.router.surprise is not None:
        layer.router.surprise.set_counts(torch.arange(VOCABULARY))
    return layer


def make_input() -> tuple[torch.Tensor, RoutingHints]:
    generator = torch.Generator().manual_seed(1)
    tokens_BT = torch.randint(VOCABULARY, (2, LENGTH), generator=generator)
    hints = RoutingHints(tokens_BT, wanted_BT=tokens_BT % 3 == 0)
    return torch.randn(2, LENGTH, WIDTH, generator=generator), hints


def branches(layer: HamMixer, x_BTD: torch.Tensor) -> dict[str, torch.Tensor]:
    """Queries, keys, values and gates of both branches, from the weights and nothing else."""
    history = F.pad(layer.qkv(x_BTD), (0, 0, layer.conv.size - 1, 0))
    mixed = sum(
        history[:, shift : shift + LENGTH] * layer.conv.weight_WC[shift]
        for shift in range(layer.conv.size)
    )
    q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in mixed.chunk(3, dim=-1))
    unit = {name: F.normalize(F.silu(x), dim=-1) for name, x in (("q", q), ("k", k))}
    log_decay, beta = layer.gates(x_BTD)
    return {
        "q": unit["q"],
        "k": unit["k"],
        "v": F.silu(v),
        "log_decay": log_decay,
        "beta": beta,
        "attention_q": layer.rotary(layer.q_norm(q)),
        "attention_k": layer.rotary(layer.k_norm(k)),
    }


EVERY_SCORE = [
    "cosine",
    "committed",
    "l2",
    "post_update",
    "learned",
    "random",
    "periodic",
    "prefix",
    "lexical",
    "oracle",
]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("score", EVERY_SCORE)
def test_target_zero_is_the_gated_delta_rule_with_hams_output_gates(score, scope) -> None:
    layer, (x_BTD, hints) = make_layer(score=score, target=0.0, scope=scope), make_input()
    parts = branches(layer, x_BTD)
    memory = reference(
        *(parts[name] for name in ("q", "k", "v", "log_decay", "beta")),
        initial_state_BHKV=None,
        cu_seqlens_N1=None,
        scale=(WIDTH // HEADS) ** -0.5,
        chunk_size=1,
    )
    gate_BTH = torch.sigmoid(layer.branch_gates(x_BTD))[..., :HEADS]
    o_BTHV = gate_BTH[..., None] * layer.recurrent_norm(memory.o_BTHV)
    y_BTD, aux = layer(x_BTD, hints)
    assert not aux.routed_BT.any()
    torch.testing.assert_close(y_BTD, layer.out(o_BTHV.flatten(-2)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("score", EVERY_SCORE)
def test_target_one_is_softmax_attention(score, scope, monkeypatch) -> None:
    layer, (x_BTD, hints) = make_layer(score=score, target=1.0, scope=scope), make_input()
    parts = branches(layer, x_BTD)
    heads_first = (parts[name].transpose(1, 2) for name in ("attention_q", "attention_k", "v"))
    expected_BTHV = F.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)

    read_outs = []
    attend = layer.store.attend

    def remembering(*arguments):
        read_outs.append(attend(*arguments))
        return read_outs[-1]

    monkeypatch.setattr(layer.store, "attend", remembering)
    # The recurrent gate 0, the attention gate 1, the branch norm the identity.
    monkeypatch.setattr(HamMixer, "_norms_attended", False)
    with torch.no_grad():
        layer.branch_gates.weight.zero_()
        layer.branch_gates.bias.copy_(torch.tensor([-torch.inf] * HEADS + [torch.inf] * HEADS))
    y_BTD, aux = layer(x_BTD, hints)
    assert aux.routed_BT.all()
    torch.testing.assert_close(read_outs[0][0], expected_BTHV, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y_BTD, layer.out(expected_BTHV.flatten(-2)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("target", "kept"), [(0.0, False), (1.0, True)])
def test_heads_that_decide_alone_reach_both_ends(target, kept) -> None:
    layer, (x_BTD, _) = make_layer(reduction="per_head", target=target), make_input()
    y_BTD, aux = layer(x_BTD)
    assert bool(aux.routed_BTH.all()) is kept and bool(aux.routed_BTH.any()) is kept
    together, _ = make_layer(target=target)(x_BTD)
    torch.testing.assert_close(y_BTD, together, rtol=1e-5, atol=1e-5)
