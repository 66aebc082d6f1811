"""The Triton provider of the gated delta rule against the float64 reference.

Without a GPU the kernels run in Triton's interpreter, in float32. On a GPU the same comparisons run
compiled, and every tile configuration is compared once more: Triton 3.4-3.7 compiles some products
of transposed products wrongly on Hopper (FLA#640), which no interpreter shows.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from delta_rule_checks import (
    LIMIT,
    OUTPUTS,
    errors_on,
    make_inputs,
    outputs_and_gradients,
    plain_kernels,
    relative_errors,
    worst,
)
from triton_device import interpreter, needs_gpu

from ham.errors import ConfigError, DeviceError
from ham.kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_scored
from ham.kernels.gated_delta_rule.cases import GatedDeltaRuleCase as Case
from ham.routing import head_scores

__all__ = ["interpreter", "needs_gpu", "plain_kernels"]

CASES = [
    Case(1, 1, 2, 16, 24, initial_state=True),
    Case(2, 63, 1, 16, 24),
    Case(1, 64, 1, 24, 16, initial_state=True),
    Case(1, 65, 2, 16, 24, initial_state=True, gates="extreme"),
    Case(1, 130, 1, 72, 40, gates="extreme"),
]
GPU_CASES = [
    *(
        Case(1, time, 3, 32, 64, initial_state=True, gates="extreme")
        for time in (1, 63, 64, 65, 200)
    ),
    Case(1, 1000, 2, 64, 64),
    Case(1, 1000, 2, 64, 32, gates="extreme"),
    Case(3, 200, 5, 128, 128, initial_state=True, gates="extreme"),
    Case(1, 500, 2, 128, 64),
    Case(2, 200, 2, 24, 16, gates="extreme"),
]
SIZES = [(128, 128), (64, 64), (128, 64), (32, 32)]
gpu = pytest.mark.gpu


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_and_gradients_match_float64(case: Case) -> None:
    errors = relative_errors(case, torch.float32)
    assert worst(errors) < LIMIT[torch.float32], errors


@pytest.mark.parametrize("score", ["cosine", "l2", "committed"])
def test_scores_match_their_definition(score: str) -> None:
    case = Case(1, 70, 3, 16, 40, initial_state=True, gates="extreme")
    inputs = make_inputs(case, torch.float32)
    wide = {name: value.double() for name, value in inputs.items()}
    expected = gated_delta_rule_scored(**wide, score=score, provider="torch")
    received = gated_delta_rule_scored(**inputs, score=score, provider="triton")
    assert received.score_BTH.dtype == torch.float32
    torch.testing.assert_close(received.score_BTH.double(), expected.score_BTH, atol=1e-5, rtol=0)
    torch.testing.assert_close(received.o_BTHV.double(), expected.o_BTHV, atol=1e-5, rtol=0)


def test_empty_state_scores_exactly_one() -> None:
    inputs = make_inputs(Case(1, 3, 1, 16, 16), torch.float32)
    score_BTH = gated_delta_rule_scored(**inputs, provider="triton").score_BTH
    assert score_BTH[0, 0, 0].item() == 1.0


def test_scores_carry_no_gradient_and_read_outs_do() -> None:
    inputs = make_inputs(Case(1, 5, 1, 16, 16), torch.float32)
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    scored = gated_delta_rule_scored(**leaves, provider="triton")
    assert not scored.score_BTH.requires_grad
    scored.o_BTHV.sum().backward()
    assert leaves["v_BTHV"].grad.abs().sum().item() > 0


def test_prediction_is_exact_where_nothing_is_written() -> None:
    inputs = make_inputs(Case(1, 66, 1, 16, 16, initial_state=True), torch.float32)
    inputs["beta_BTH"] = torch.zeros_like(inputs["beta_BTH"])
    wide = {name: value.double() for name, value in inputs.items()}
    expected = gated_delta_rule(**wide, provider="reference").prediction_BTHV
    received = gated_delta_rule(**inputs, provider="triton").prediction_BTHV
    torch.testing.assert_close(received.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("beta", [0.0, 1e-8, 1.0])
@pytest.mark.parametrize("log_decay", [-20.0, -1e-6])
def test_constant_gates_at_their_ends(log_decay: float, beta: float) -> None:
    inputs = make_inputs(Case(1, 66, 1, 16, 16, initial_state=True), torch.float32)
    inputs["log_decay_BTH"] = torch.full_like(inputs["log_decay_BTH"], log_decay)
    inputs["beta_BTH"] = torch.full_like(inputs["beta_BTH"], beta)
    errors = errors_on(inputs, torch.float32)
    assert worst(errors) < LIMIT[torch.float32], errors


def equal_keys(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The triangle whose finite series has the largest terms: one key, beta 1, hardly any decay."""
    inputs = make_inputs(Case(1, 70, 1, 32, 32, initial_state=True), dtype)
    inputs["k_BTHK"] = inputs["k_BTHK"][:, :1].expand_as(inputs["k_BTHK"]).contiguous()
    inputs["beta_BTH"] = torch.ones_like(inputs["beta_BTH"])
    inputs["log_decay_BTH"] = torch.full_like(inputs["log_decay_BTH"], -1e-3)
    return inputs


def test_equal_keys() -> None:
    assert worst(errors_on(equal_keys(torch.float32), torch.float32)) < LIMIT[torch.float32]


@gpu
def test_gpu_equal_keys_in_bfloat16(needs_gpu: None) -> None:
    """Read-outs only: the gradient of the decay is a difference of large numbers here."""
    errors = errors_on(equal_keys(torch.bfloat16), torch.bfloat16)
    assert worst({name: errors[name] for name in OUTPUTS}) < LIMIT[torch.bfloat16]


def test_loads_without_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other way to load, taken in float32 and before Hopper."""
    from ham.kernels.gated_delta_rule import triton_forward

    monkeypatch.setattr(triton_forward, "use_descriptors", lambda v_BTHV: False)
    errors = relative_errors(Case(1, 65, 2, 24, 40, initial_state=True), torch.float32)
    assert worst(errors) < LIMIT[torch.float32]


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that starts as NaN must not show in any output or gradient."""
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(empty_like(*a, **k)))
    inputs = make_inputs(Case(1, 65, 1, 24, 24, initial_state=True), torch.float32)
    received = outputs_and_gradients(inputs, "triton", torch.float32)
    assert all(value.isfinite().all() for value in received.values())


def test_inputs_need_not_be_contiguous() -> None:
    inputs = make_inputs(Case(1, 20, 2, 16, 16), torch.float32)
    expected = gated_delta_rule(**inputs, provider="triton").o_BTHV
    strided = {
        name: value.transpose(1, 2).contiguous().transpose(1, 2) for name, value in inputs.items()
    }
    assert not strided["q_BTHK"].is_contiguous()
    assert torch.equal(gated_delta_rule(**strided, provider="triton").o_BTHV, expected)


def test_what_the_kernels_lack_is_refused_by_name() -> None:
    inputs = make_inputs(Case(1, 2, 1, 16, 16), torch.float32)
    with pytest.raises(ConfigError, match=r"float64"):
        gated_delta_rule(**{n: v.double() for n, v in inputs.items()}, provider="triton")
    with pytest.raises(ConfigError, match="V = 18"):
        gated_delta_rule(**make_inputs(Case(1, 2, 1, 16, 18), torch.float32), provider="triton")
    with pytest.raises(ConfigError, match="K = 160"):
        gated_delta_rule(**make_inputs(Case(1, 2, 1, 160, 16), torch.float32), provider="triton")
    with pytest.raises(ConfigError, match="unknown score"):
        gated_delta_rule_scored(**inputs, score="entropy", provider="triton")


def test_without_interpreter_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = Case(1, 2, 1, 16, 16).inputs(torch.float32, torch.device("cpu"), 0)
    with pytest.raises(DeviceError, match="triton"):
        gated_delta_rule(**inputs, provider="triton")


def test_importing_the_operation_does_not_import_triton() -> None:
    code = "import ham.kernels.gated_delta_rule, sys; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@gpu
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
def test_gpu_matches_float64(needs_gpu: None, case: Case, dtype: torch.dtype) -> None:
    errors = relative_errors(case, dtype)
    assert worst(errors) < LIMIT[dtype], errors


@gpu
@pytest.mark.parametrize("score", ["cosine", "l2", "committed"])
def test_gpu_scores_in_bfloat16(needs_gpu: None, plain_kernels: None, score: str) -> None:
    """Mean error at most 0.005; at most 1 % of decisions change at a quarter routed."""
    inputs = make_inputs(Case(2, 1000, 4, 128, 128), torch.bfloat16)
    wide = {name: value.double() for name, value in inputs.items()}
    prediction_BTHV = gated_delta_rule(**wide, provider="torch").prediction_BTHV
    expected = head_scores(score, prediction_BTHV, wide["v_BTHV"], wide["beta_BTH"])
    received = gated_delta_rule_scored(**inputs, score=score, provider="triton").score_BTH.double()
    flips = [part.amin(-1) >= part.amin(-1).quantile(0.75) for part in (received, expected)]
    error, flipped = (received - expected).abs().mean(), (flips[0] != flips[1]).double().mean()
    print(f"{score}: mean error {error:.5f}, decisions flipped {flipped:.5f}")
    assert error < 0.005 and flipped <= 0.01


@gpu
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gpu_every_tile_configuration(
    needs_gpu: None,
    plain_kernels: None,
    monkeypatch: pytest.MonkeyPatch,
    sizes: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    from ham.kernels.gated_delta_rule import triton_sequences, triton_tiles

    monkeypatch.setattr(triton_sequences, "SHORTEST_SEGMENT", 1)
    case = Case(1, 400, 2, *sizes, initial_state=True, gates="extreme")
    choose = triton_tiles.choose_tile
    for kernel in ("inverse", "segment", "saving_walk", "reverse", "gradient"):
        for number, tile in enumerate(triton_tiles.tiles(kernel, dtype, *sizes)):

            def chosen(asked: str, *sizes: Any, kernel=kernel, tile=tile) -> Any:
                return tile if asked == kernel else choose(asked, *sizes)

            monkeypatch.setattr(triton_tiles, "choose_tile", chosen)
            errors = relative_errors(case, dtype, seed=number)
            assert worst(errors) < LIMIT[dtype], (kernel, tile, errors)


@gpu
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("sizes", [(32, 64), (128, 128)], ids=str)
def test_gpu_same_inputs_give_same_bits(
    needs_gpu: None, plain_kernels: None, sizes: tuple[int, int], dtype: torch.dtype
) -> None:
    """A difference between runs would be a race."""
    inputs = make_inputs(Case(4, 1000, 16, *sizes, initial_state=True), dtype)
    first = outputs_and_gradients(inputs, "triton", dtype)
    for _ in range(4):
        again = outputs_and_gradients(inputs, "triton", dtype)
        assert all(torch.equal(first[name], again[name]) for name in first)
