"""The recurrence of Mamba-2: agreement of chunked and step-by-step form, corners."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ham.errors import ConfigError
from ham.kernels.registry import find_operation
from ham.kernels.ssd import ssd, ssd_step
from ham.kernels.ssd.cases import SsdCase
from ham.kernels.verify import compare

CPU = torch.device("cpu")


def test_one_token_by_hand() -> None:
    """h = exp(0.5 * -2) * 3 + 0.5 * 4 * 5 = 11.1036..., y = 2 h + 7 * 4."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    output = ssd(
        4 * one,
        0.5 * one[..., 0],
        torch.tensor([-2.0], dtype=torch.float64),
        5 * one[..., 0],
        2 * one[..., 0],
        torch.tensor([7.0], dtype=torch.float64),
        initial_state_BHPS=3 * one,
    )
    assert output.final_state_BHPS.item() == pytest.approx(11.103638323514327, rel=1e-15)
    assert output.y_BTHP.item() == pytest.approx(50.207276647028654, rel=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("gates", ["typical", "extreme"])
@pytest.mark.parametrize("initial_state", [False, True], ids=["empty", "state"])
@pytest.mark.parametrize("batch, heads", [(1, 3), (3, 1)], ids=["B1-H3", "B3-H1"])
@pytest.mark.parametrize("time", [1, 63, 64, 65, 200])
def test_outputs_and_gradients(
    time: int, batch: int, heads: int, initial_state: bool, gates: Any, dtype: torch.dtype
) -> None:
    case = SsdCase(batch, time, heads, 16, 24, 64, initial_state, gates)
    result = compare(find_operation("ssd"), "torch", case, dtype, CPU)
    assert result.passed, result.errors


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_groups(groups: int, dtype: torch.dtype) -> None:
    case = SsdCase(2, 70, 4, 16, 24, 32, initial_state=True, groups=groups)
    result = compare(find_operation("ssd"), "torch", case, dtype, CPU)
    assert result.passed, result.errors


@pytest.mark.parametrize("provider", ["reference", "torch"])
def test_heads_of_a_group_share_b_and_c(provider: str) -> None:
    """Two groups of two heads are two calls with one b and c each."""
    inputs = SsdCase(1, 40, 4, 8, 6, groups=2).inputs(torch.float64, CPU, seed=6)
    whole = ssd(**inputs, provider=provider)
    for group in range(2):
        heads = slice(2 * group, 2 * group + 2)
        part = ssd(
            inputs["x_BTHP"][:, :, heads],
            inputs["dt_BTH"][:, :, heads],
            inputs["a_H"][heads],
            inputs["b_BTS"][:, :, group],
            inputs["c_BTS"][:, :, group],
            inputs["d_H"][heads],
            provider=provider,
        )
        torch.testing.assert_close(part.y_BTHP, whole.y_BTHP[:, :, heads], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(part.final_state_BHPS, whole.final_state_BHPS[:, heads])


@pytest.mark.parametrize("chunk_size", [1, 7, 32, 128, 1000])
def test_chunk_size_changes_nothing(chunk_size: int) -> None:
    case = SsdCase(2, 130, 2, 24, 16, chunk_size, initial_state=True)
    result = compare(find_operation("ssd"), "torch", case, torch.float64, CPU)
    assert result.passed, result.errors


@pytest.mark.parametrize("step", [0.0, 10.0, 1000.0])
def test_constant_step_sizes_at_their_ends(step: float) -> None:
    """Step sizes of 10 and 1000 forget everything: log decays down to -16,000 a token."""
    inputs = SsdCase(2, 130, 2, 16, 24, initial_state=True).inputs(torch.float32, CPU, seed=1)
    inputs["dt_BTH"] = torch.full_like(inputs["dt_BTH"], step)
    leaves = {
        name: value.requires_grad_() for name, value in inputs.items() if name != "chunk_size"
    }
    outputs = [ssd(**leaves, provider=provider) for provider in ("torch", "reference")]
    gradients = [
        torch.autograd.grad(sum(x.sum() for x in output), list(leaves.values()))
        for output in outputs
    ]
    for got, expected in zip(*outputs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * max(step, 1.0))
    for name, got, expected in zip(leaves, *gradients, strict=True):
        size = expected.abs().max().item()
        assert got.isfinite().all(), name
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * size + 1e-5, msg=name)


def test_gradcheck() -> None:
    inputs = SsdCase(1, 5, 2, 3, 2, initial_state=True).inputs(torch.float64, CPU, 3)
    names = [name for name in inputs if name != "chunk_size"]

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(ssd(**dict(zip(names, tensors, strict=True)), chunk_size=2))

    assert torch.autograd.gradcheck(run, [inputs[name].requires_grad_() for name in names])


def test_steps_continue_a_chunked_prefill() -> None:
    inputs = SsdCase(2, 70, 2, 16, 24).inputs(torch.float64, CPU, seed=5)
    x, dt, a, b, c, d = (value for name, value in inputs.items() if name != "chunk_size")
    whole = ssd(**inputs)
    state = ssd(x[:, :60], dt[:, :60], a, b[:, :60], c[:, :60], d).final_state_BHPS
    for t in range(60, 70):
        y, state = ssd_step(x[:, t], dt[:, t], a, b[:, t], c[:, t], d, state)
        torch.testing.assert_close(y, whole.y_BTHP[:, t], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(state, whole.final_state_BHPS, rtol=1e-12, atol=1e-13)


def test_two_halves_joined_by_the_state() -> None:
    inputs = SsdCase(2, 150, 2, 16, 24, initial_state=True).inputs(torch.float64, CPU, seed=4)
    tensors = [value.requires_grad_() for name, value in inputs.items() if name != "chunk_size"]
    x, dt, a, b, c, d, start = tensors
    whole = ssd(x, dt, a, b, c, d, initial_state_BHPS=start)
    first = ssd(x[:, :77], dt[:, :77], a, b[:, :77], c[:, :77], d, initial_state_BHPS=start)
    second = ssd(
        x[:, 77:],
        dt[:, 77:],
        a,
        b[:, 77:],
        c[:, 77:],
        d,
        initial_state_BHPS=first.final_state_BHPS,
    )
    joined = torch.cat([first.y_BTHP, second.y_BTHP], 1)
    torch.testing.assert_close(joined, whole.y_BTHP, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(second.final_state_BHPS, whole.final_state_BHPS)
    losses = (joined.square().sum(), whole.y_BTHP.square().sum())
    for got, expected in zip(*(torch.autograd.grad(loss, tensors) for loss in losses), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("provider", ["reference", "torch"])
def test_low_precision_inputs_are_computed_in_float32(provider: str) -> None:
    inputs = SsdCase(2, 70, 2, 16, 24).inputs(torch.bfloat16, CPU, seed=7)
    exact = {
        name: value.float() if name != "chunk_size" else value for name, value in inputs.items()
    }
    low, high = ssd(**inputs, provider=provider), ssd(**exact, provider=provider)
    assert low.y_BTHP.dtype == torch.bfloat16
    assert low.final_state_BHPS.dtype == torch.float32
    assert torch.equal(low.final_state_BHPS, high.final_state_BHPS)
    assert torch.equal(low.y_BTHP, high.y_BTHP.bfloat16())


@pytest.mark.parametrize("provider", ["reference", "torch"])
def test_autocast_has_no_effect(provider: str) -> None:
    inputs = SsdCase(2, 70, 2, 16, 24).inputs(torch.float32, CPU, seed=8)
    plain = ssd(**inputs, provider=provider)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = ssd(**inputs, provider=provider)
    for got, expected in zip(autocast, plain, strict=True):
        assert torch.equal(got, expected)


def test_unknown_provider_is_named_with_the_legal_ones() -> None:
    inputs = SsdCase(1, 4, 1, 4, 4).inputs(torch.float32, CPU, seed=0)
    with pytest.raises(ConfigError, match=r"'cuda-magic'; known: reference, torch, triton"):
        ssd(**inputs, provider="cuda-magic")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("b_BTS", (1, 3, 4)),
        ("b_BTS", (1, 4, 2, 4)),
        ("c_BTS", (1, 4, 1, 4)),
        ("a_H", (2,)),
        ("x_BTHP", (1, 4, 4)),
    ],
)
def test_shapes_that_do_not_fit(name: str, shape: tuple[int, ...]) -> None:
    inputs = SsdCase(1, 4, 1, 4, 4).inputs(torch.float32, CPU, seed=0)
    inputs[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=r"must be"):
        ssd(**inputs)
