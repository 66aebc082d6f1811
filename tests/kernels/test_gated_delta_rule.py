"""The gated delta rule: identities, agreement of chunked and step-by-step form, corners."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ham.errors import ConfigError
from ham.kernels.chunks import (
    decay_products,
    merge_chunks,
    resolve_chunk_size,
    split_chunks,
    unit_triangular_inverse,
)
from ham.kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_step
from ham.kernels.gated_delta_rule.cases import GatedDeltaRuleCase
from ham.kernels.gated_delta_rule.chunked import _Chunks
from ham.kernels.registry import find_operation
from ham.kernels.verify import compare

CPU = torch.device("cpu")
SMALL = GatedDeltaRuleCase(1, 4, 1, 4, 4)
IDENTITIES = GatedDeltaRuleCase(2, 192, 3, key_size=16, value_size=24)


@pytest.fixture(scope="module")
def inputs() -> dict[str, Any]:
    return IDENTITIES.inputs(torch.float64, CPU, seed=0)


def largest(x: Tensor) -> float:
    return x.abs().max().item()


def committed_by_wy_form(inputs: dict[str, Any]) -> Tensor:
    """`v_new = u - w S` of the usual WY form (arXiv 2412.06464, section 3.3), beta on the rows."""
    k, v = (split_chunks(inputs[name], 64) for name in ("k_BTHK", "v_BTHV"))
    beta = split_chunks(inputs["beta_BTH"], 64).unsqueeze(-1)
    cumulative = split_chunks(inputs["log_decay_BTH"], 64).cumsum(-1)
    gamma = cumulative.exp().unsqueeze(-1)
    inverse = unit_triangular_inverse(beta * decay_products(cumulative, torch.float64) * (k @ k.mT))
    u, w = inverse @ (beta * v), inverse @ (beta * gamma * k)
    state = torch.zeros(*k.shape[1:3], k.shape[-1], v.shape[-1], dtype=torch.float64)
    committed = []
    for chunk in range(k.shape[0]):
        new = u[chunk] - w[chunk] @ state
        committed.append(new)
        last = gamma[chunk, :, :, -1:]
        to_end = (cumulative[chunk, :, :, -1:] - cumulative[chunk]).exp().unsqueeze(-1)
        state = last * state + (to_end * k[chunk]).mT @ new
    return merge_chunks(torch.stack(committed), 192)


class TestIdentities:
    """ham.md 3.9: six identities in float64 at T = 192, K = 16, V = 24, chunk 64.

    The bounds are within a factor of ten of the errors reported there.
    """

    def test_chunked_output_is_recurrent_output(self, inputs: dict[str, Any]) -> None:
        chunked = gated_delta_rule(**inputs)
        loop = gated_delta_rule(**inputs, provider="reference")
        assert largest(chunked.o_BTHV - loop.o_BTHV) < 4e-14

    def test_wy_update_is_beta_times_residual(self, inputs: dict[str, Any]) -> None:
        prediction = gated_delta_rule(**inputs, provider="reference").prediction_BTHV
        update = inputs["beta_BTH"].unsqueeze(-1) * (inputs["v_BTHV"] - prediction)
        assert largest(committed_by_wy_form(inputs) - update) < 4e-15

    def test_post_update_error_is_one_minus_beta_times_pre_update_error(
        self, inputs: dict[str, Any]
    ) -> None:
        names = ("q_BTHK", "k_BTHK", "v_BTHV", "log_decay_BTH", "beta_BTH")
        state = torch.zeros(2, 3, 16, 24, dtype=torch.float64)
        for token in zip(*(inputs[name].unbind(1) for name in names), strict=True):
            _, state, prediction = gated_delta_rule_step(*token, state)
            _, key, value, _, beta = token
            after = value - torch.einsum("bhkv,bhk->bhv", state, key)
            before = (1.0 - beta.unsqueeze(-1)) * (value - prediction)
            assert largest(after - before) < 9e-15

    def test_cosine_ignores_the_decay(self, inputs: dict[str, Any]) -> None:
        decayed = gated_delta_rule(**inputs).prediction_BTHV[:, 1:]
        decay = inputs["log_decay_BTH"][:, 1:].exp().unsqueeze(-1)
        value = inputs["v_BTHV"][:, 1:]
        cosines = (F.cosine_similarity(p, value, dim=-1) for p in (decayed, decayed / decay))
        with_decay, without_decay = cosines
        assert largest(with_decay - without_decay) < 2e-13

    @pytest.mark.parametrize(("provider", "bound"), [("reference", 0.0), ("torch", 4e-14)])
    def test_rolled_keys_as_queries_read_the_prediction(
        self, inputs: dict[str, Any], provider: str, bound: float
    ) -> None:
        loop = gated_delta_rule(**inputs, provider="reference")
        rolled = {**inputs, "q_BTHK": inputs["k_BTHK"].roll(-1, dims=1)}
        read = gated_delta_rule(**rolled, scale=1.0, provider=provider).o_BTHV[:, :-1]
        decay = inputs["log_decay_BTH"][:, 1:].exp().unsqueeze(-1)
        assert largest(decay * read - loop.prediction_BTHV[:, 1:]) <= bound

    def test_cosine_of_the_prediction_follows_from_the_update(self, inputs: dict[str, Any]) -> None:
        prediction = gated_delta_rule(**inputs).prediction_BTHV[:, 1:]
        value = inputs["v_BTHV"]
        difference = inputs["beta_BTH"].unsqueeze(-1) * value - committed_by_wy_form(inputs)
        from_update = F.cosine_similarity(difference[:, 1:], value[:, 1:], dim=-1)
        assert largest(from_update - F.cosine_similarity(prediction, value[:, 1:], dim=-1)) < 7e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("gates", ["typical", "extreme"])
@pytest.mark.parametrize("initial_state", [False, True], ids=["empty", "state"])
@pytest.mark.parametrize("batch, heads", [(1, 3), (3, 1)], ids=["B1-H3", "B3-H1"])
@pytest.mark.parametrize("time", [1, 63, 64, 65, 200])
def test_outputs_and_gradients(
    time: int, batch: int, heads: int, initial_state: bool, gates: Any, dtype: torch.dtype
) -> None:
    case = GatedDeltaRuleCase(batch, time, heads, 16, 24, 64, initial_state, gates)
    result = compare(find_operation("gated_delta_rule"), "torch", case, dtype, CPU)
    assert result.passed, result.errors


@pytest.mark.parametrize("chunk_size", [1, 7, 16, 32, 128, 1000])
def test_chunk_size_changes_nothing(chunk_size: int) -> None:
    case = GatedDeltaRuleCase(2, 130, 2, 24, 16, chunk_size, initial_state=True)
    result = compare(find_operation("gated_delta_rule"), "torch", case, torch.float64, CPU)
    assert result.passed, result.errors


def test_default_chunk_size_suits_the_device() -> None:
    assert resolve_chunk_size(None, CPU) == 32
    assert resolve_chunk_size(None, torch.device("cuda")) == 64
    with pytest.raises(ValueError, match="at least 1, not 0"):
        gated_delta_rule(**{**SMALL.inputs(torch.float32, CPU, 0), "chunk_size": 0})


@pytest.mark.parametrize("beta", [0.0, 1.0])
@pytest.mark.parametrize("log_decay", [-1000.0, -10.0, -0.0])
def test_constant_gates_at_their_ends(log_decay: float, beta: float) -> None:
    case = GatedDeltaRuleCase(2, 130, 2, 16, 24, initial_state=True)
    inputs = case.inputs(torch.float32, CPU, seed=1)
    inputs["log_decay_BTH"] = torch.full_like(inputs["log_decay_BTH"], log_decay)
    inputs["beta_BTH"] = torch.full_like(inputs["beta_BTH"], beta)
    leaves = {
        name: value.requires_grad_() for name, value in inputs.items() if name != "chunk_size"
    }
    chunked = gated_delta_rule(**leaves)
    loop = gated_delta_rule(**leaves, provider="reference")
    for got, expected in zip(chunked, loop, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    gradients = [
        torch.autograd.grad(sum(x.square().sum() for x in output), list(leaves.values()))
        for output in (chunked, loop)
    ]
    for name, got, expected in zip(leaves, *gradients, strict=True):
        assert got.isfinite().all(), name
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, msg=name)


def test_equal_keys_without_decay() -> None:
    """The worst-conditioned system with unit keys: all entries below the diagonal are 1."""
    case = GatedDeltaRuleCase(1, 128, 2, 16, 24)
    inputs = case.inputs(torch.float32, CPU, seed=2)
    inputs["k_BTHK"] = inputs["k_BTHK"][:, :1].expand(-1, 128, -1, -1)
    inputs["beta_BTH"] = torch.ones_like(inputs["beta_BTH"])
    inputs["log_decay_BTH"] = torch.zeros_like(inputs["log_decay_BTH"])
    prediction = gated_delta_rule(**inputs).prediction_BTHV
    torch.testing.assert_close(prediction[:, 1:], inputs["v_BTHV"][:, :-1], rtol=0.0, atol=1e-5)


def test_gradcheck() -> None:
    inputs = GatedDeltaRuleCase(1, 5, 2, 3, 2, initial_state=True).inputs(torch.float64, CPU, 3)
    names = [name for name in inputs if name != "chunk_size"]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(gated_delta_rule(**dict(zip(names, tensors, strict=True)), chunk_size=2))

    assert torch.autograd.gradcheck(run, [inputs[name].requires_grad_() for name in names])


def test_two_halves_joined_by_the_state() -> None:
    case = GatedDeltaRuleCase(2, 150, 2, 16, 24, initial_state=True)
    inputs = case.inputs(torch.float64, CPU, seed=4)
    start = inputs.pop("initial_state_BHKV")
    leaves = {
        name: value.requires_grad_() for name, value in inputs.items() if name != "chunk_size"
    }

    def halves() -> tuple[Tensor, Tensor, Tensor]:
        left = {name: value[:, :77] for name, value in leaves.items()}
        right = {name: value[:, 77:] for name, value in leaves.items()}
        first = gated_delta_rule(**left, initial_state_BHKV=start)
        second = gated_delta_rule(**right, initial_state_BHKV=first.final_state_BHKV)
        return (
            torch.cat([first.o_BTHV, second.o_BTHV], 1),
            second.final_state_BHKV,
            torch.cat([first.prediction_BTHV, second.prediction_BTHV], 1),
        )

    whole = gated_delta_rule(**leaves, initial_state_BHKV=start)
    joined = halves()
    for got, expected in zip(joined, whole, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    gradients = [
        torch.autograd.grad(sum(x.square().sum() for x in output), list(leaves.values()))
        for output in (joined, whole)
    ]
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_steps_continue_a_chunked_prefill() -> None:
    inputs = GatedDeltaRuleCase(2, 70, 2, 16, 24).inputs(torch.float64, CPU, seed=5)
    names = ("q_BTHK", "k_BTHK", "v_BTHV", "log_decay_BTH", "beta_BTH")
    whole = gated_delta_rule(**inputs)
    prefill = gated_delta_rule(**{name: inputs[name][:, :60] for name in names})
    state = prefill.final_state_BHKV
    for t in range(60, 70):
        o, state, prediction = gated_delta_rule_step(*(inputs[name][:, t] for name in names), state)
        torch.testing.assert_close(o, whole.o_BTHV[:, t], rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(prediction, whole.prediction_BTHV[:, t], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(state, whole.final_state_BHKV, rtol=1e-12, atol=1e-13)


def test_later_tokens_change_nothing() -> None:
    inputs = GatedDeltaRuleCase(1, 130, 2, 16, 24).inputs(torch.float64, CPU, seed=6)
    changed = {
        name: torch.cat([value[:, :90], value[:, 90:].flip(1)], 1) if name != "chunk_size" else 64
        for name, value in inputs.items()
    }
    before, after = gated_delta_rule(**inputs), gated_delta_rule(**changed)
    torch.testing.assert_close(before.o_BTHV[:, :90], after.o_BTHV[:, :90], rtol=0, atol=1e-15)
    torch.testing.assert_close(
        before.prediction_BTHV[:, :90], after.prediction_BTHV[:, :90], rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("provider", ["reference", "torch"])
def test_low_precision_inputs_are_computed_in_float32(provider: str) -> None:
    inputs = GatedDeltaRuleCase(2, 70, 2, 16, 24).inputs(torch.bfloat16, CPU, seed=7)
    exact = {
        name: value.float() if name != "chunk_size" else value for name, value in inputs.items()
    }
    low = gated_delta_rule(**inputs, provider=provider)
    high = gated_delta_rule(**exact, provider=provider)
    assert low.o_BTHV.dtype == torch.bfloat16
    assert low.prediction_BTHV.dtype == low.final_state_BHKV.dtype == torch.float32
    assert torch.equal(low.prediction_BTHV, high.prediction_BTHV)
    assert torch.equal(low.o_BTHV, high.o_BTHV.bfloat16())


@pytest.mark.parametrize("provider", ["reference", "torch"])
def test_autocast_has_no_effect(provider: str) -> None:
    inputs = GatedDeltaRuleCase(2, 70, 2, 16, 24).inputs(torch.float32, CPU, seed=8)
    leaf = inputs["k_BTHK"].requires_grad_()
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = gated_delta_rule(**inputs, provider=provider)
        (gradient,) = torch.autograd.grad(output.o_BTHV.square().sum(), leaf)
        results.append((*output, gradient))
    for plain, autocast in zip(*results, strict=True):
        assert autocast.dtype == torch.float32
        assert torch.equal(plain, autocast)


def test_layout_of_the_inputs_does_not_matter() -> None:
    inputs = GatedDeltaRuleCase(2, 70, 2, 16, 24).inputs(torch.float64, CPU, seed=9)
    strided = {
        name: value.transpose(0, 1).contiguous().transpose(0, 1) if name != "chunk_size" else value
        for name, value in inputs.items()
    }
    for got, expected in zip(gated_delta_rule(**strided), gated_delta_rule(**inputs), strict=True):
        assert torch.equal(got, expected)


def test_unknown_provider_is_named_with_the_legal_ones() -> None:
    inputs = SMALL.inputs(torch.float32, CPU, seed=0)
    with pytest.raises(ConfigError, match=r"'cuda-magic'; known: reference, torch"):
        gated_delta_rule(**inputs, provider="cuda-magic")


@pytest.mark.parametrize(
    ("name", "shape"),
    [("k_BTHK", (1, 4, 1, 5)), ("beta_BTH", (1, 3, 1)), ("q_BTHK", (1, 4, 4))],
)
def test_shapes_that_do_not_fit(name: str, shape: tuple[int, ...]) -> None:
    inputs = SMALL.inputs(torch.float32, CPU, seed=0)
    inputs[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"must be"):
        gated_delta_rule(**inputs)


def test_no_uninitialised_memory_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass fills a buffer of its own; here it starts as NaN."""
    empty_like = torch.empty_like
    poisoned = []

    def poison(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            poisoned.append(make)
            return make(*args, **kwargs).fill_(torch.nan)

        return made

    monkeypatch.setattr(torch, "empty_like", poison(empty_like))
    case = GatedDeltaRuleCase(2, 130, 2, 16, 24, chunk_size=64, initial_state=True)
    result = compare(find_operation("gated_delta_rule"), "torch", case, torch.float64, CPU)
    assert result.passed, result.errors
    assert empty_like in poisoned


def test_forwards_change_nothing_in_place() -> None:
    """Results changed in place have gradient 0 when torch 2.11 compiles them; 2.13 is right."""
    cumulative = torch.zeros(2, 4, dtype=torch.float64)
    assert decay_products(cumulative, torch.float64)._version == 0
    q = torch.ones(3, 16, 8, dtype=torch.float64, requires_grad=True)
    beta, state = torch.ones(3, 16, dtype=torch.float64), torch.zeros(1, 8, 8, dtype=torch.float64)
    o, *_ = _Chunks.apply(q, q, q, torch.zeros(3, 16, dtype=torch.float64), beta, state)
    assert {saved._version for saved in o.grad_fn.saved_tensors} == {0} and o._version == 0
