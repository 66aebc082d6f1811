"""Attention over routed tokens: agreement with the masked softmax, empty rows, the cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ham.errors import ConfigError
from ham.kernels.registry import find_operation
from ham.kernels.routed_attention import routed_attention, routed_attention_cached
from ham.kernels.routed_attention.cases import RoutedAttentionCase
from ham.kernels.routed_attention.packed import QUERY_BLOCK, pack_positions
from ham.kernels.verify import compare

CPU = torch.device("cpu")
PROVIDERS = ["reference", "torch"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("fraction", [0.0, 0.03, 0.25, 1.0])
@pytest.mark.parametrize(
    "batch, heads, value_size", [(1, 3, 16), (3, 1, 24)], ids=["B1-H3-V16", "B3-H1-V24"]
)
@pytest.mark.parametrize("time", [1, 63, 64, 65, QUERY_BLOCK + 1])
def test_outputs_and_gradients(
    time: int, batch: int, heads: int, value_size: int, fraction: float, dtype: torch.dtype
) -> None:
    case = RoutedAttentionCase(batch, time, heads, 16, value_size, fraction, ragged=batch > 1)
    result = compare(find_operation("routed_attention"), "torch", case, dtype, CPU)
    assert result.passed, result.errors


def test_packing_keeps_the_order() -> None:
    routed = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)
    packed = pack_positions(routed, routed.cumsum(1))
    assert packed.tolist() == [[1, 3, 4, 5, 5], [5, 5, 5, 5, 5], [0, 1, 2, 3, 4]]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_two_routed_tokens_by_hand(provider: str) -> None:
    """Tokens 1 and 2 are keys with equal scores: tokens 2 and 3 read the mean of their values."""
    q = torch.ones(1, 4, 1, 2)
    v = torch.tensor([10.0, 1.0, 3.0, 50.0]).reshape(1, 4, 1, 1)
    routed = torch.tensor([[False, True, True, False]])
    o = routed_attention(q, q, v, routed, provider=provider)
    assert o.flatten().tolist() == [0.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_window_by_hand(provider: str) -> None:
    """Token 0 is routed, equal scores: each token reads the mean of its own value, of the one
    before it and, once that is further away, of token 0; none is counted twice."""
    q = torch.ones(1, 4, 1, 2)
    v = torch.tensor([8.0, 2.0, 6.0, 4.0]).reshape(1, 4, 1, 1)
    routed = torch.tensor([[True, False, False, False]])
    o = routed_attention(q, q, v, routed, window=2, provider=provider)
    torch.testing.assert_close(o.flatten(), torch.tensor([8.0, 5.0, 16 / 3, 6.0]))
    alone = routed_attention(q, q, v, ~routed & routed, window=1, provider=provider)
    assert torch.equal(alone, v)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_null_key_by_hand(provider: str) -> None:
    """A null key with the score of every other key halves what a single key gives."""
    q = torch.ones(1, 3, 1, 2)
    v = torch.tensor([10.0, 4.0, 8.0]).reshape(1, 3, 1, 1)
    routed = torch.tensor([[False, True, True]])
    o = routed_attention(q, q, v, routed, sink_HK=torch.ones(1, 2), provider=provider)
    torch.testing.assert_close(o.flatten(), torch.tensor([0.0, 2.0, 4.0]))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_grouped_heads_are_repeated_heads(provider: str) -> None:
    case = RoutedAttentionCase(2, 40, 6, 8, 8, key_heads=2, window=3)
    inputs = case.inputs(torch.float64, CPU, seed=6)
    o = routed_attention(**inputs, provider=provider)
    for name in ("k_BTGK", "v_BTGV"):
        inputs[name] = inputs[name].repeat_interleave(3, 2)
    torch.testing.assert_close(routed_attention(**inputs, provider=provider), o)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("window", [0, 4])
def test_score_gradient_is_that_of_a_factor_of_one(provider: str, window: int) -> None:
    """Without a window it is dL/dv . v of routed tokens; with one, a token that is only ever read
    through it gets nothing."""
    case = RoutedAttentionCase(2, 20, 3, 4, 5, 0.5, key_heads=1, window=window, score=True)
    inputs = case.inputs(torch.float64, CPU, seed=7)
    v, score = inputs["v_BTGV"].requires_grad_(), inputs["router_score_BT"].requires_grad_()
    o = routed_attention(**inputs, provider=provider)
    weight = torch.randn(o.shape, dtype=o.dtype, generator=torch.Generator().manual_seed(8))
    dv, dscore = torch.autograd.grad(o, [v, score], weight)
    routed = inputs["routed_BT"]
    assert (dscore[~routed] == 0).all()
    if window == 0:
        torch.testing.assert_close(dscore, (dv * v).sum((2, 3)).detach() * routed)
    else:
        assert (dscore[:, -window:] == 0).all() and (dscore != 0).any()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("pattern", ["nothing", "last_token", "ragged"])
def test_rows_without_keys_are_zero_and_pass_no_gradient(provider: str, pattern: str) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(3, QUERY_BLOCK + 20, 2, 8, requires_grad=True) for _ in range(3)]
    routed = torch.zeros(3, QUERY_BLOCK + 20, dtype=torch.bool)
    if pattern == "last_token":
        routed[:, -1] = True
    if pattern == "ragged":
        routed[1, 200:] = True
        routed[2] = True
    empty = routed.cumsum(1) == 0
    o = routed_attention(*tensors, routed, provider=provider)
    gradients = torch.autograd.grad(o.square().sum() + o.sum(), tensors)
    assert torch.equal(o[empty], torch.zeros_like(o[empty]))
    assert o.isfinite().all() and (o[~empty] != 0).all()
    for gradient in gradients:
        assert gradient.isfinite().all()
    grad_q, grad_k, grad_v = gradients
    assert (grad_q[empty] == 0).all()
    assert (grad_k[~routed] == 0).all() and (grad_v[~routed] == 0).all()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_all_routed_is_causal_attention(provider: str, dtype: torch.dtype, bound: float) -> None:
    torch.manual_seed(1)
    q, k, v = torch.randn(3, 2, 130, 3, 16, dtype=dtype).unbind(0)
    o = routed_attention(q, k, v, torch.ones(2, 130, dtype=torch.bool), provider=provider)
    expected = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
    ).transpose(1, 2)
    assert (o - expected).abs().max() <= bound


def test_unrouted_keys_and_later_tokens_change_nothing() -> None:
    inputs = RoutedAttentionCase(2, 100, 2, 16, 16).inputs(torch.float64, CPU, seed=2)
    routed = inputs["routed_BT"]
    o = routed_attention(**inputs)
    noisy = dict(inputs)
    for name in ("k_BTGK", "v_BTGV"):
        noisy[name] = torch.where(routed[..., None, None], inputs[name], 1e3)
        noisy[name] = torch.cat([noisy[name][:, :60], noisy[name][:, 60:].flip(1)], 1)
    noisy["routed_BT"] = torch.cat([routed[:, :60], routed[:, 60:].flip(1)], 1)
    torch.testing.assert_close(routed_attention(**noisy)[:, :60], o[:, :60], rtol=1e-13, atol=1e-14)


def test_gradcheck() -> None:
    inputs = RoutedAttentionCase(2, 6, 1, 3, 2, 0.5).inputs(torch.float64, CPU, seed=3)
    inputs["routed_BT"][0] = False
    inputs["routed_BT"][1] = torch.tensor([0, 1, 0, 1, 1, 0]).bool()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return routed_attention(q, k, v, inputs["routed_BT"], scale=0.7)

    tensors = [inputs[name].requires_grad_() for name in ("q_BTHK", "k_BTGK", "v_BTGV")]
    assert torch.autograd.gradcheck(run, tensors)


def test_gradcheck_with_every_switch() -> None:
    """Routing scores are left out: their gradient is by intention not that of the output."""
    case = RoutedAttentionCase(2, 6, 2, 3, 2, 0.5, key_heads=1, window=2, sink=True)
    inputs = case.inputs(torch.float64, CPU, seed=9)
    names = ("q_BTHK", "k_BTGK", "v_BTGV", "sink_HK")
    tensors = [inputs.pop(name).requires_grad_() for name in names]

    def run(*leaves: Tensor) -> Tensor:
        return routed_attention(**dict(zip(names, leaves, strict=True)), **inputs)

    assert torch.autograd.gradcheck(run, tensors)


def build_cache(k: Tensor, v: Tensor, routed: Tensor, slots: int, fill: float) -> tuple:
    """Packed keys and values with `fill` in every unused slot."""
    batch = k.shape[0]
    keys = torch.full((batch, slots, *k.shape[2:]), fill, dtype=k.dtype)
    values = torch.full((batch, slots, *v.shape[2:]), fill, dtype=v.dtype)
    positions = torch.zeros(batch, slots, dtype=torch.int64)
    for row in range(batch):
        index = routed[row].nonzero().flatten()
        keys[row, : len(index)], values[row, : len(index)] = k[row, index], v[row, index]
        positions[row, : len(index)] = index
    return keys, values, positions, routed.sum(1)


@pytest.mark.parametrize("queries", [1, 7, 40])
@pytest.mark.parametrize("fill", [0.0, 30.0])
def test_cache_reads_what_the_whole_sequence_reads(queries: int, fill: float) -> None:
    """Unused slots sit at position 0, which every query sees; only the count hides them."""
    case = RoutedAttentionCase(4, 40, 2, 16, 24, 0.3, ragged=True)
    inputs = case.inputs(torch.float64, CPU, seed=4)
    q, k, v, routed = inputs.values()
    cache = build_cache(k, v, routed, slots=45, fill=fill)
    positions = torch.arange(40 - queries, 40).expand(4, -1)
    o = routed_attention_cached(q[:, -queries:], *cache, positions)
    expected = routed_attention(**inputs, provider="reference")[:, -queries:]
    torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-13)
    assert (o[0] == 0).all()


def test_cache_without_slots() -> None:
    empty = torch.zeros(2, 0, 1, 4)
    none = torch.zeros(2, 0, dtype=torch.int64)
    o = routed_attention_cached(
        torch.randn(2, 1, 1, 4), empty, empty, none, torch.zeros(2).long(), torch.ones(2, 1).long()
    )
    assert torch.equal(o, torch.zeros(2, 1, 1, 4))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_output_has_the_dtype_of_the_values(provider: str) -> None:
    inputs = RoutedAttentionCase(2, 40, 2, 16, 16, 0.3).inputs(torch.bfloat16, CPU, seed=5)
    exact = {
        name: value.float() if value.is_floating_point() else value
        for name, value in inputs.items()
    }
    o = routed_attention(**inputs, provider=provider)
    assert o.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: one rounding of weights, one of the result, values up to 3.
    difference = o.float() - routed_attention(**exact, provider="reference")
    assert difference.abs().max() < 3 * 2**-7


def test_unknown_provider_is_named_with_the_legal_ones() -> None:
    inputs = RoutedAttentionCase(1, 4, 1, 4, 4).inputs(torch.float32, CPU, seed=0)
    with pytest.raises(ConfigError, match=r"'cuda-magic'; known: reference, torch"):
        routed_attention(**inputs, provider="cuda-magic")


def test_arguments_that_do_not_fit() -> None:
    x = torch.zeros(1, 4, 1, 4)
    with pytest.raises(ValueError, match="routed must be boolean"):
        routed_attention(x, x, x, torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"routed must be \(1, 4\)"):
        routed_attention(x, x, x, torch.ones(1, 5, dtype=torch.bool))
    routed = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="window must be at least 0, not -1"):
        routed_attention(x, x, x, routed, window=-1)
    with pytest.raises(ValueError, match=r"sink must be \(1, 4\)"):
        routed_attention(x, x, x, routed, sink_HK=torch.zeros(4))
    with pytest.raises(ValueError, match="3 query heads cannot share 2 key heads"):
        routed_attention(torch.zeros(1, 4, 3, 4), *torch.zeros(2, 1, 4, 2, 4), routed)
