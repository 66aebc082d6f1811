"""Parts of a decode step and the causes of their failures, on a CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sweeps import make_sweep, settings_of

from ham.measure.sweep.causes import LIMIT, whole_cause
from ham.measure.sweep.grid import MODELS, SMOKE, Cell
from ham.measure.sweep.ops import FUSED, PLAIN
from ham.measure.sweep.parts import part_times
from ham.measure.sweep.sessions import ModelSession


def model_session(mixer: str) -> ModelSession:
    cell = Cell("model_decode_part", mixer, 64, 2, 0.25 if mixer == "ham" else None, 32)
    session = ModelSession(make_sweep().shelf.decoder(mixer), settings_of(cell))
    session.prepare()
    session.capture()
    return session


@pytest.mark.parametrize("mixer", MODELS)
def test_every_part_of_a_step_runs_alone(mixer: str) -> None:
    session = model_session(mixer)
    parts = session.parts()
    assert {"projections", "mlp", "norms", "head"} < parts.keys()
    assert not set(session.fused_parts()) - parts.keys()
    with torch.inference_mode():
        for run in parts.values():
            run()


def test_norms_are_timed_on_two_tensors_as_in_the_step() -> None:
    session, seen = model_session("transformer"), []
    session.settings.ops = replace(session.settings.ops, add_norm=lambda *args: seen.append(args))
    session.parts()["norms"]()
    assert len(seen) == 2 * SMOKE.layers
    assert all(x is not y for x, y, _ in seen)


def test_a_part_that_cannot_be_fused_is_timed_in_plain_operations_and_says_so() -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("backend='inductor' raised:\nLoweringError: no such kernel")

    session = model_session("transformer")
    session.settings.ops = replace(session.settings.ops, name=FUSED, gated_unit=broken)
    found = part_times(session, make_sweep())
    assert found["mlp"].time.value > 0 and found["mlp"].operations == PLAIN
    assert "LoweringError: no such kernel" in found["mlp"].note
    assert found["norms"].operations == FUSED and found["norms"].note is None


def test_a_part_without_any_form_is_a_row_beside_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no head")

    monkeypatch.setattr(ModelSession, "_head", lambda session, x_BD: session.tokens_B.float())
    session = model_session("transformer")
    monkeypatch.setattr(ModelSession, "_head", broken)
    found = part_times(session, make_sweep())
    assert found["head"].time is None and "ValueError: no head" in found["head"].error
    assert found["mlp"].time.value > 0


def test_the_whole_cause_of_a_failure_is_told() -> None:
    try:
        try:
            raise KeyError("the kernel")
        except KeyError as error:
            raise RuntimeError(
                "backend='inductor' raised:\n\nLoweringError: no kernel\n"
                "  Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace"
            ) from error
    except RuntimeError as error:
        told = whole_cause(error)
    assert told == (
        "RuntimeError: backend='inductor' raised: LoweringError: no kernel, "
        "caused by KeyError: 'the kernel'"
    )
    long = whole_cause(ValueError("begin " + "x" * 2000 + " end"))
    assert len(long) == LIMIT and long.startswith("ValueError: begin") and long.endswith(" end")
