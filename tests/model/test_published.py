"""The same weights in published implementations give the same outputs and gradients.

transformers' torch paths on the CPU, flash-linear-attention on a GPU. Weights are copied from ours;
`load_state_dict` is strict, so that none is left out. Each test names what deviates.
"""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", minversion="5.24")

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.llama import modeling_llama as llama
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from ham.kernels.gated_delta_rule import gated_delta_rule
from ham.model.mixer import MixerShape, SequenceMixer
from ham.model.registry import mixer_class, parse_options

WIDTH, HEADS = 64, 4
LIMIT = 1e-5
"""Of |found - expected| / (1 + |expected|) in float32."""


def our_mixer(name: str, **options) -> SequenceMixer:
    torch.manual_seed(0)
    shape = MixerShape(WIDTH, HEADS, max_positions=256, kernels="torch")
    return mixer_class(name)(shape, parse_options(name, options, context=128))


def inputs(length: int) -> Tensor:
    return torch.randn(2, length, WIDTH, generator=torch.Generator().manual_seed(1))


def assert_same(found: Tensor, expected: Tensor, what: str) -> None:
    far = ((found - expected).abs() / (1 + expected.abs())).max()
    assert far <= LIMIT, f"{what}: {float(far):.3g}"


def assert_layers_agree(ours: SequenceMixer, theirs, x_BTD: Tensor) -> None:
    """Outputs, and the gradient of the input."""
    weights_BTD = inputs(x_BTD.shape[1]).flip(0)
    results = []
    for layer in (lambda x: ours(x)[0], theirs):
        leaf_BTD = x_BTD.clone().requires_grad_()
        y_BTD = layer(leaf_BTD)
        (slope_BTD,) = torch.autograd.grad((y_BTD * weights_BTD).sum(), leaf_BTD)
        results.append((y_BTD.detach(), slope_BTD))
    (y, slope), (expected, expected_slope) = results
    assert expected.std() > 0.01, "an output of zeros would agree with anything"
    assert_same(y, expected, "output")
    assert_same(slope, expected_slope, "gradient of the input")


def attention_weights(ours: SequenceMixer) -> dict[str, Tensor]:
    kv_width = (ours.qkv.weight.shape[0] - WIDTH) // 2
    parts = ours.qkv.weight.split((WIDTH, kv_width, kv_width))
    names = ("q_proj.weight", "k_proj.weight", "v_proj.weight")
    return {**dict(zip(names, parts, strict=True)), "o_proj.weight": ours.out.weight}


def attention_config(make: type, **values):
    config = make(
        hidden_size=WIDTH, num_attention_heads=HEADS, max_position_embeddings=256, **values
    )
    config._attn_implementation = "eager"
    return config


def rotated(attention: nn.Module, rotary: nn.Module, config, make_mask):
    """Their attention alone, with the positions and the mask that their model gives it."""

    def layer(x_BTD: Tensor) -> Tensor:
        positions_BT = torch.arange(x_BTD.shape[1])[None]
        mask = make_mask(config, x_BTD, None, None, position_ids=positions_BT)
        return attention(x_BTD, rotary(x_BTD, positions_BT), mask)[0]

    return layer


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_grouped_query_attention_is_that_of_llama(kv_heads: int) -> None:
    """No deviation: rotary positions in the half-split layout, query heads in order of groups."""
    ours = our_mixer("transformer", kv_heads=kv_heads)
    config = attention_config(llama.LlamaConfig, num_key_value_heads=kv_heads)
    theirs = llama.LlamaAttention(config, layer_idx=0)
    theirs.load_state_dict(attention_weights(ours))
    rotary = llama.LlamaRotaryEmbedding(config)
    assert_layers_agree(ours, rotated(theirs, rotary, config, create_causal_mask), inputs(63))


def test_the_window_is_that_of_mistral() -> None:
    """No deviation: a window of W holds the current token and the W - 1 before it."""
    ours = our_mixer("sliding_window", window=24)
    config = attention_config(mistral.MistralConfig, num_key_value_heads=HEADS, sliding_window=24)
    theirs = mistral.MistralAttention(config, layer_idx=0)
    theirs.load_state_dict(attention_weights(ours))
    layer = rotated(
        theirs, mistral.MistralRotaryEmbedding(config), config, create_sliding_window_causal_mask
    )
    assert_layers_agree(ours, layer, inputs(101))


def mamba2_weights(ours: SequenceMixer) -> dict[str, Tensor]:
    return {
        "in_proj.weight": ours.project.weight,
        "conv1d.weight": ours.conv.weight_WC.T[:, None],
        "conv1d.bias": ours.conv_bias_C,
        "A_log": ours.log_rate_H,
        "dt_bias": ours.step_bias_H,
        "D": ours.skip_H,
        "norm.weight": ours.output_norm.weight,
        "out_proj.weight": ours.out.weight,
    }


def test_mamba2_is_that_of_transformers() -> None:
    """With one group of B and C, as ours has."""
    ours = our_mixer("mamba2", state_size=16, head_dim=32)
    nn.init.normal_(ours.conv_bias_C, std=0.1)
    config = mamba2.Mamba2Config(
        hidden_size=WIDTH,
        num_heads=HEADS,
        head_dim=32,
        expand=2,
        state_size=16,
        n_groups=1,
        chunk_size=32,
        layer_norm_epsilon=1e-6,
    )
    theirs = mamba2.Mamba2Mixer(config, layer_idx=0).eval()
    theirs.load_state_dict(mamba2_weights(ours))
    assert_layers_agree(ours, theirs, inputs(101))


def test_the_gated_delta_rule_layer_is_that_of_qwen3_next() -> None:
    """Deviation: theirs divides keys by sqrt(|k|² + 1e-6), ours by max(|k|, 1e-6)."""
    ours = our_mixer("gated_delta_rule")
    size = WIDTH // HEADS
    config = qwen.Qwen3NextConfig(
        hidden_size=WIDTH,
        linear_num_key_heads=HEADS,
        linear_num_value_heads=HEADS,
        linear_key_head_dim=size,
        linear_value_head_dim=size,
        linear_conv_kernel_dim=4,
        rms_norm_eps=1e-6,
    )
    theirs = qwen.Qwen3NextGatedDeltaNet(config, layer_idx=0)
    q, k, v = (part.unflatten(0, (HEADS, size)) for part in ours.qkv.weight.chunk(3))
    z = ours.output_gate.weight.unflatten(0, (HEADS, size))
    step_HD, write_HD = ours.gates.projection.weight.chunk(2)
    theirs.load_state_dict(
        {
            # Theirs puts what belongs to a head together.
            "in_proj_qkvz.weight": torch.cat((q, k, v, z), dim=1).flatten(0, 1),
            "in_proj_ba.weight": torch.stack((write_HD, step_HD), dim=1).flatten(0, 1),
            "conv1d.weight": ours.conv.weight_WC.T[:, None],
            "A_log": ours.gates.log_rate_H,
            "dt_bias": ours.gates.step_bias_H,
            "norm.weight": ours.output_norm.weight,
            "out_proj.weight": ours.out.weight,
        }
    )
    assert_layers_agree(ours, theirs, inputs(101))


@pytest.mark.parametrize("provider", ["reference", "torch"])
@pytest.mark.parametrize(
    "theirs",
    [qwen.torch_chunk_gated_delta_rule, qwen.torch_recurrent_gated_delta_rule],
    ids=["chunk", "recurrent"],
)
def test_the_gated_delta_rule_is_that_of_transformers(theirs, provider: str) -> None:
    """No deviation: two value heads read one key head, and a state is carried in and out."""
    generator = torch.Generator().manual_seed(2)

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(2, *sizes, generator=generator)

    q, k = (nn.functional.normalize(drawn(70, 2, 8), dim=-1) for _ in range(2))
    v, state = drawn(70, 4, 12), drawn(4, 8, 12)
    log_decay, beta = -drawn(70, 4).abs(), drawn(70, 4).sigmoid()
    leaves = [x.requires_grad_() for x in (q, k, v, log_decay, beta, state)]
    ours = gated_delta_rule(
        q, k, v, log_decay, beta, initial_state_BHKV=state, provider=provider, chunk_size=32
    )
    expected = theirs(q, k, v, log_decay, beta, initial_state=state, output_final_state=True)
    weights = drawn(70, 4, 12)
    slopes = []
    for o, final in ((ours.o_BTHV, ours.final_state_BHKV), expected):
        slopes.append(torch.autograd.grad((o * weights).sum() + final.square().sum(), leaves))
    assert_same(ours.o_BTHV, expected[0], "read-outs")
    assert_same(ours.final_state_BHKV, expected[1], "final state")
    for name, found, wanted in zip(("q", "k", "v", "g", "b", "S"), *slopes, strict=True):
        assert_same(found, wanted, f"gradient of {name}")


@pytest.fixture
def fla_layers():
    """The layers of flash-linear-attention, which run on a GPU only."""
    if not torch.cuda.is_available():
        pytest.skip("flash-linear-attention needs a CUDA device")
    return pytest.importorskip("fla.layers")


@pytest.mark.gpu
def test_the_gated_delta_rule_layer_is_that_of_fla(fla_layers) -> None:
    """Deviation: theirs divides keys by sqrt(|k|² + 1e-6). 50 tokens: its form in float32."""
    ours = our_mixer("gated_delta_rule").cuda()
    theirs = fla_layers.GatedDeltaNet(
        WIDTH, expand_v=1, head_dim=WIDTH // HEADS, num_heads=HEADS, norm_eps=1e-6
    )
    projections = ours.qkv.weight.chunk(3)
    convolutions = ours.conv.weight_WC.T[:, None].chunk(3)
    step_HD, write_HD = ours.gates.projection.weight.chunk(2)
    theirs.load_state_dict(
        {
            **{f"{n}_proj.weight": w for n, w in zip("qkv", projections, strict=True)},
            **{f"{n}_conv1d.weight": w for n, w in zip("qkv", convolutions, strict=True)},
            "a_proj.weight": step_HD,
            "b_proj.weight": write_HD,
            "A_log": ours.gates.log_rate_H,
            "dt_bias": ours.gates.step_bias_H,
            "g_proj.weight": ours.output_gate.weight,
            "o_norm.weight": ours.output_norm.weight,
            "o_proj.weight": ours.out.weight,
        }
    )
    with torch.no_grad():
        x_BTD = inputs(50).cuda()
        assert_same(ours(x_BTD)[0], theirs.cuda().eval()(x_BTD)[0], "output")


@pytest.mark.gpu
def test_mamba2_is_that_of_fla(fla_layers) -> None:
    """With one group of B and C and without biases of the projections, as ours has it."""
    ours = our_mixer("mamba2", state_size=16, head_dim=32).cuda()
    theirs = fla_layers.Mamba2(
        num_heads=HEADS,
        head_dim=32,
        hidden_size=WIDTH,
        state_size=16,
        n_groups=1,
        use_conv_bias=True,
        use_bias=False,
        chunk_size=32,
        norm_eps=1e-6,
        layer_idx=0,
    )
    theirs.load_state_dict(mamba2_weights(ours))
    with torch.no_grad():
        x_BTD = inputs(101).cuda()
        found = theirs.cuda().eval()(x_BTD)
        found = found[0] if isinstance(found, tuple) else found
        assert_same(ours(x_BTD)[0], found, "output")
