"""Triton kernels around the recurrence against float64: in the interpreter, on a GPU where there is
one (tests marked `gpu`)."""

from __future__ import annotations

import pytest
import torch
from triton_device import CUDA, DEVICE, interpreter, needs_gpu

from ham.errors import ConfigError
from ham.kernels.convolved_heads import Rotation, convolved_heads
from ham.kernels.convolved_heads.cases import VERIFY_CASES as HEAD_CASES
from ham.kernels.convolved_heads.cases import ConvolvedHeadsCase
from ham.kernels.gated_sum import gated_sum
from ham.kernels.gated_sum.cases import VERIFY_CASES as SUM_CASES
from ham.kernels.gated_sum.cases import GatedSumCase
from ham.kernels.registry import find_operation
from ham.kernels.verify import SEED, TOLERANCES, Case, compare

__all__ = ["interpreter", "needs_gpu"]

SMALL = [
    ("convolved_heads", ConvolvedHeadsCase(2, 70, 1, 24, 24, rotated=False)),
    ("convolved_heads", ConvolvedHeadsCase(1, 65, 2, 16, 32, attention=False)),
    ("convolved_heads", ConvolvedHeadsCase(1, 3, 1, 16, 24, width=3)),
    ("gated_sum", GatedSumCase(2, 33, 3, 24)),
    # Longer than a segment of the gradient.
    ("convolved_heads", ConvolvedHeadsCase(1, 582, 1, 16, 24, width=3)),
    ("convolved_heads", ConvolvedHeadsCase(1, 513, 1, 24, 16, width=1)),
]
LARGE = [
    *(("convolved_heads", case) for case in HEAD_CASES),
    ("convolved_heads", ConvolvedHeadsCase(3, 1000, 5, 64, 64)),
    ("convolved_heads", ConvolvedHeadsCase(1, 500, 2, 128, 256, width=2)),
    *(("gated_sum", case) for case in SUM_CASES),
    ("gated_sum", GatedSumCase(3, 1000, 5, 64)),
]


def name(value: object) -> str:
    return value if isinstance(value, str) else value.name


@pytest.mark.parametrize(("operation", "case"), SMALL, ids=name)
def test_outputs_and_gradients(operation: str, case: Case) -> None:
    found = compare(find_operation(operation), "triton", case, torch.float32, DEVICE)
    assert found.refused is None and found.passed, found.errors


def test_cases_reach_into_a_second_segment() -> None:
    from ham.kernels.convolved_heads.triton_launch import SEGMENT_TOKENS

    widths = {case.width for _, case in SMALL[4:] if case.time > SEGMENT_TOKENS}
    assert widths == {1, 3}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("operation", "case"), LARGE, ids=name)
def test_outputs_and_gradients_on_a_gpu(
    operation: str, case: Case, dtype: torch.dtype, needs_gpu: None
) -> None:
    found = compare(find_operation(operation), "triton", case, dtype, DEVICE)
    assert found.refused is None and found.worst <= TOLERANCES[dtype], found.errors


def test_zero_rows_give_zero_and_no_nan() -> None:
    inputs = ConvolvedHeadsCase(1, 20, 2, 16, 16).inputs(torch.float32, DEVICE, SEED)
    inputs["x_BTC"] = torch.zeros_like(inputs["x_BTC"]).requires_grad_()
    made = convolved_heads(**inputs, provider="triton")
    assert all((part == 0).all() for part in made)
    sum(part.sum() for part in made).backward()
    expected = torch.autograd.grad(
        sum(part.sum() for part in convolved_heads(**inputs)), inputs["x_BTC"]
    )[0]
    # Gradients are in the millions there: 1 over the floor of the norm.
    torch.testing.assert_close(inputs["x_BTC"].grad, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("ragged", [False, True])
def test_continuing_from_a_history_is_reading_at_once(ragged: bool) -> None:
    case = ConvolvedHeadsCase(2, 37, 2, 16, 24)
    inputs = case.inputs(torch.float32, DEVICE, SEED)
    x_BTC, table = inputs.pop("x_BTC"), inputs.pop("rotation")
    whole = convolved_heads(x_BTC, **inputs, rotation=table)
    cut = 20
    rest = Rotation(*(part[cut:] for part in table))
    if ragged:
        rest = Rotation(*(part.expand(2, -1, -1) for part in rest))
    with torch.no_grad():
        made = convolved_heads(
            x_BTC[:, cut:],
            **inputs,
            rotation=rest,
            history_BWC=x_BTC[:, cut - 3 : cut],
            provider="triton",
        )
    for part, expected in zip(made, whole, strict=True):
        torch.testing.assert_close(part, expected[:, cut:], rtol=1e-5, atol=1e-6)


def test_every_element_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that starts as NaN must not show in any output or gradient."""
    for owner, kind in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        make = getattr(owner, kind)
        monkeypatch.setattr(
            owner,
            kind,
            lambda *given, make=make, **options: make(*given, **options).fill_(torch.nan),
        )
    for operation, case in (SMALL[2], SMALL[3]):
        found = compare(find_operation(operation), "triton", case, torch.float32, DEVICE)
        assert found.passed, found.errors


def test_what_the_kernels_lack_is_said() -> None:
    inputs = ConvolvedHeadsCase(1, 5, 2, 16, 16).inputs(torch.float32, DEVICE, SEED)
    x_BTC = inputs.pop("x_BTC").requires_grad_()
    history = torch.zeros(1, 3, x_BTC.shape[-1], device=DEVICE)
    with pytest.raises(ConfigError, match="no gradient with a history"):
        convolved_heads(x_BTC, **inputs, history_BWC=history, provider="triton")
    wide = torch.ones(5, x_BTC.shape[-1], device=DEVICE)
    with pytest.raises(ConfigError, match="up to 4 tokens, not 5"):
        convolved_heads(x_BTC, **{**inputs, "weight_WC": wide}, provider="triton")
    fused = find_operation("convolved_heads").providers["triton"]
    assert "up to 4 tokens" in fused.refusal({**inputs, "x_BTC": x_BTC, "weight_WC": wide})
    assert fused.refusal({**inputs, "x_BTC": x_BTC}) is None
    with pytest.raises(ConfigError, match="float64"):
        convolved_heads(x_BTC.double(), **inputs, provider="triton")
    with pytest.raises(ValueError, match="belong together"):
        convolved_heads(x_BTC, **{**inputs, "k_gain_K": None})
    rows = torch.zeros(1, 5, 2, 16, device=DEVICE)
    gain = torch.ones(16, device=DEVICE)
    with pytest.raises(ValueError, match=r"gates must be \[1, 5, 4\], not \[1, 5, 2\]"):
        gated_sum(rows, rows, rows[..., 0], gain, gain)


@pytest.mark.skipif(CUDA, reason="shapes are looked at without running anything")
def test_operators_are_what_a_compiler_takes_them_for() -> None:
    """Shapes and dtypes of fake outputs, no aliases, and gradients through `torch.compile`."""
    inputs = ConvolvedHeadsCase(1, 9, 2, 16, 24).inputs(torch.float32, DEVICE, SEED)
    arguments = (
        inputs["x_BTC"],
        inputs["weight_WC"],
        inputs["q_gain_K"],
        inputs["k_gain_K"],
        *inputs["rotation"],
        None,
        2,
        16,
    )
    for part in arguments[:4]:
        part.requires_grad_()
    torch.library.opcheck(torch.ops.ham.convolved_heads_forward.default, arguments)
    sums = GatedSumCase(1, 9, 2, 16).inputs(torch.float32, DEVICE, SEED)
    summed = tuple(part.requires_grad_() for part in sums.values())
    torch.library.opcheck(torch.ops.ham.gated_sum_forward.default, summed)
