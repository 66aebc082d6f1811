"""Segments, sequences of different length, grouped heads and compilation of the Triton provider."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from delta_rule_checks import (
    LIMIT,
    errors_on,
    make_inputs,
    outputs_and_gradients,
    relative_errors,
    worst,
)
from triton_device import DEVICE, interpreter, needs_gpu

from ham.errors import ConfigError
from ham.kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_scored
from ham.kernels.gated_delta_rule.cases import GatedDeltaRuleCase as Case
from ham.kernels.triton_target import Target, stand_in

__all__ = ["interpreter", "needs_gpu"]

gpu = pytest.mark.gpu
LONG = Case(1, 330, 1, 24, 16, initial_state=True)
MIXED = Case(1, 330, 2, 16, 24, initial_state=True, key_heads=1, lengths=(130, 0, 199, 1))
SHORT = Case(1, 70, 2, 16, 16, initial_state=True, key_heads=1, lengths=(64, 0, 5, 1))
GPU_CASES = [
    Case(1, 2000, 2, 128, 128, initial_state=True),
    Case(1, 2000, 2, 128, 128, initial_state=True, gates="extreme"),
    Case(1, 2001, 2, 64, 64),
    Case(1, 1500, 4, 128, 64, initial_state=True, key_heads=2, lengths=(64, 0, 1, 700, 735)),
    Case(1, 1500, 4, 64, 128, gates="extreme", key_heads=1, lengths=(1499, 1)),
    Case(3, 200, 6, 128, 128, initial_state=True, gates="extreme", key_heads=3),
    Case(1, 300, 2, 32, 32, initial_state=True, lengths=(150, 150)),
]


@pytest.fixture
def many_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let even short sequences be cut into segments."""
    from ham.kernels.gated_delta_rule import triton_sequences

    monkeypatch.setattr(triton_sequences, "SHORTEST_SEGMENT", 1)


def slow_decay(inputs: dict[str, Any], factor: float) -> dict[str, Any]:
    return {**inputs, "log_decay_BTH": inputs["log_decay_BTH"] * factor}


@pytest.mark.parametrize("decay", ["slow", "typical", "extreme"])
@pytest.mark.parametrize("multiprocessors", [1, 4])
def test_segments(many_segments: None, multiprocessors: int, decay: str) -> None:
    """Two segments, and as many as chunks; states pass them, or hardly, or not at all."""
    case = Case(**{**vars(LONG), "gates": "extreme" if decay == "extreme" else "typical"})
    inputs = make_inputs(case, torch.float32)
    if decay == "slow":
        inputs = slow_decay(inputs, 0.01)
    with stand_in(Target((9, 0), multiprocessors)):
        assert worst(errors_on(inputs, torch.float32)) < LIMIT[torch.float32]


def test_what_decays_is_not_walked(many_segments: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under strong decay transitions stay unwritten, and unread: they start as NaN here."""
    from ham.kernels.gated_delta_rule import triton_segments

    made = []
    start = triton_segments.start_segments

    def started(*args: Any) -> Any:
        made.append(start(*args))
        return made[-1]

    empty = torch.empty

    def poisoned(*args: Any, **options: Any) -> torch.Tensor:
        tensor = empty(*args, **options)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(triton_segments, "start_segments", started)
    monkeypatch.setattr(torch, "empty", poisoned)
    inputs = make_inputs(LONG, torch.float32)
    for factor, written in ((0.01, True), (30.0, False)):
        with stand_in(Target((9, 0), 2)):
            errors = errors_on(slow_decay(inputs, factor), torch.float32)
        assert worst(errors) < LIMIT[torch.float32]
        _, transitions_XSKK = made.pop()
        assert transitions_XSKK.shape[1] == 2
        assert transitions_XSKK.isfinite().all().item() == written


def test_long_keys_make_states_grow(many_segments: None) -> None:
    """The bound on a transition is not the decay alone: `I - beta k k^T` may stretch."""
    inputs = make_inputs(LONG, torch.float32)
    inputs["k_BTHK"] = inputs["k_BTHK"] * 1.5
    inputs["beta_BTH"] = torch.ones_like(inputs["beta_BTH"])
    inputs["log_decay_BTH"] = torch.full_like(inputs["log_decay_BTH"], -0.2)
    with stand_in(Target((9, 0), 2)):
        assert worst(errors_on(inputs, torch.float32)) < LIMIT[torch.float32]


@pytest.mark.parametrize(("multiprocessors", "decay"), [(1, 1.0), (8, 0.01)])
def test_sequences_of_different_length(
    many_segments: None, multiprocessors: int, decay: float
) -> None:
    """One of them empty, one of a single token; two value heads share a key head."""
    inputs = slow_decay(make_inputs(MIXED, torch.float32), decay)
    with stand_in(Target((9, 0), multiprocessors)):
        assert worst(errors_on(inputs, torch.float32)) < LIMIT[torch.float32]


@pytest.mark.parametrize("provider", ["torch", "triton"])
def test_sequences_are_independent(provider: str) -> None:
    inputs = make_inputs(MIXED, torch.float32)
    together = gated_delta_rule(**inputs, provider=provider)
    alone = {name: value[:, 130:329] for name, value in inputs.items() if value.ndim > 2}
    alone["initial_state_BHKV"] = inputs["initial_state_BHKV"][2:3]
    expected = gated_delta_rule(**alone, provider=provider)
    torch.testing.assert_close(together.o_BTHV[:, 130:329], expected.o_BTHV)
    torch.testing.assert_close(together.final_state_BHKV[2:3], expected.final_state_BHKV)
    torch.testing.assert_close(
        together.final_state_BHKV[1], inputs["initial_state_BHKV"][1], rtol=0, atol=0
    )


def test_grouped_heads() -> None:
    case = Case(2, 70, 4, 16, 24, initial_state=True, gates="extreme", key_heads=2)
    assert worst(relative_errors(case, torch.float32)) < LIMIT[torch.float32]


@pytest.mark.parametrize("case", [Case(1, 130, 1, 32, 40, initial_state=True), SHORT])
@pytest.mark.parametrize("descriptors", [True, False])
def test_gradients_with_resident_tiles(
    monkeypatch: pytest.MonkeyPatch, case: Case, descriptors: bool
) -> None:
    from ham.kernels.gated_delta_rule import triton_gradients, triton_tiles

    tile = triton_tiles.GradientTile(16, 64, 4, 2, chunks=2)
    monkeypatch.setattr(triton_tiles, "FLOAT32_GRADIENT_TILES", (tile,))
    monkeypatch.setattr(triton_tiles, "choose_tile", triton_tiles.choose_tile.__wrapped__)
    monkeypatch.setattr(triton_gradients, "use_descriptors", lambda x: descriptors)
    assert worst(relative_errors(case, torch.float32)) < LIMIT[torch.float32]


@pytest.mark.parametrize("chunks", [0, 2])
def test_gradients_as_bfloat16_takes_them(monkeypatch: pytest.MonkeyPatch, chunks: int) -> None:
    """With one part of the cumulative decay, and gradients of it that have to cancel."""
    from ham.kernels.gated_delta_rule import triton_gradients, triton_tiles

    tile = triton_tiles.GradientTile(16, 64, 4, 2, chunks)
    monkeypatch.setattr(triton_tiles, "FLOAT32_GRADIENT_TILES", (tile,))
    monkeypatch.setattr(triton_tiles, "choose_tile", triton_tiles.choose_tile.__wrapped__)
    monkeypatch.setattr(triton_gradients, "decay_parts", lambda dtype: 1)
    case = Case(2, 70, 1, 16, 24, initial_state=True)
    assert worst(relative_errors(case, torch.float32)) < LIMIT[torch.float32]


@pytest.mark.parametrize("reduction", ["min", "mean", "max"])
def test_scores_reduced_over_heads(reduction: str) -> None:
    inputs = make_inputs(Case(2, 20, 3, 16, 16, initial_state=True), torch.float32)
    expected = gated_delta_rule_scored(**inputs, reduction=reduction, provider="torch")
    received = gated_delta_rule_scored(**inputs, reduction=reduction, provider="triton")
    assert received.score_BT.shape == (2, 20)
    torch.testing.assert_close(received.score_BT, expected.score_BT, atol=1e-5, rtol=0)
    assert gated_delta_rule_scored(**inputs, provider="triton").score_BT is None


def test_scores_of_sequences_of_different_length() -> None:
    inputs = make_inputs(SHORT, torch.float32)
    expected = gated_delta_rule_scored(**inputs, reduction="min", provider="torch")
    received = gated_delta_rule_scored(**inputs, reduction="min", provider="triton")
    torch.testing.assert_close(received.score_BTH, expected.score_BTH, atol=1e-5, rtol=0)
    torch.testing.assert_close(received.score_BT, expected.score_BT, atol=1e-5, rtol=0)


@pytest.mark.parametrize("provider", ["torch", "triton"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_N1": torch.tensor([0.0, 20.0])}, "int32"),
        ({"cu_seqlens_N1": torch.tensor([20])}, r"\[N \+ 1\]"),
        ({"q_BTHK": torch.zeros(1, 20, 2, 16)}, "multiple"),
    ],
)
def test_layouts_that_do_not_fit(provider: str, change: dict[str, Any], message: str) -> None:
    inputs = make_inputs(Case(1, 20, 3, 16, 16), torch.float32)
    with pytest.raises(ValueError, match=message):
        gated_delta_rule(**{**inputs, **change}, provider=provider)


def test_sequences_need_a_batch_of_one() -> None:
    inputs = make_inputs(Case(2, 20, 1, 16, 16), torch.float32)
    with pytest.raises(ValueError, match="batch must be 1, not 2"):
        gated_delta_rule(**inputs, cu_seqlens_N1=torch.tensor([0, 20]), provider="triton")


def test_unknown_reduction() -> None:
    inputs = make_inputs(Case(1, 2, 1, 16, 16), torch.float32)
    with pytest.raises(ConfigError, match="unknown reduction"):
        gated_delta_rule_scored(**inputs, reduction="median", provider="triton")


@pytest.mark.parametrize("case", [Case(1, 5, 1, 16, 16, initial_state=True), SHORT])
def test_compiled_as_one_graph(case: Case) -> None:
    """Forward and backward under torch.compile give what they give without, bit by bit."""
    inputs = make_inputs(case, torch.float32)

    def loss(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        output = gated_delta_rule(**inputs, provider="triton")
        return output.o_BTHV.square().sum() + output.final_state_BHKV.sum()

    results = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaves = {
            name: value.clone().requires_grad_(value.is_floating_point())
            for name, value in inputs.items()
        }
        value = function(leaves)
        value.backward()
        results.append([value, *(leaf.grad for leaf in leaves.values() if leaf.requires_grad)])
    for plain, compiled in zip(*results, strict=True):
        assert torch.equal(plain, compiled)


@pytest.mark.parametrize("score", [None, "cosine"])
def test_operator_declares_its_outputs(score: str | None) -> None:
    """Shapes, dtypes, strides, mutation and autograd registration, as torch checks them."""
    inputs = make_inputs(SHORT, torch.float32)
    names = ("q_BTHK", "k_BTHK", "v_BTHV", "log_decay_BTH", "beta_BTH", "initial_state_BHKV")
    tensors = [inputs[name].requires_grad_() for name in names]
    arguments = (*tensors, inputs["cu_seqlens_N1"], 0.25, score or "", "min" if score else "")
    torch.library.opcheck(
        torch.ops.ham.gated_delta_rule.default,
        (*arguments, score is None, True),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_second_derivatives_are_refused() -> None:
    inputs = make_inputs(SHORT, torch.float32)
    q_BTHK = inputs["q_BTHK"].requires_grad_()
    o_BTHV = gated_delta_rule(**inputs, provider="triton").o_BTHV
    (dq_BTHK,) = torch.autograd.grad(o_BTHV.sum(), q_BTHK, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        dq_BTHK.sum().backward()


@gpu
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("case", GPU_CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("decay", [0.01, 1.0])
def test_gpu_layouts(needs_gpu: None, case: Case, dtype: torch.dtype, decay: float) -> None:
    inputs = slow_decay(make_inputs(case, dtype), decay)
    errors = errors_on(inputs, dtype)
    assert worst(errors) < LIMIT[dtype], errors


@gpu
def test_gpu_forward_and_backward_do_not_wait_for_the_device(needs_gpu: None) -> None:
    case = Case(1, 1500, 4, 64, 64, initial_state=True, key_heads=2, lengths=(64, 0, 1, 700, 735))
    inputs = make_inputs(case, torch.bfloat16)
    outputs_and_gradients(inputs, "triton", torch.bfloat16)
    leaves = {
        name: value.clone().requires_grad_(value.is_floating_point())
        for name, value in inputs.items()
    }
    torch.cuda.synchronize(DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gated_delta_rule(**leaves, provider="triton").o_BTHV.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
