"""torch.compile gives the logits and gradients of eager execution, machine code included."""

from __future__ import annotations

import pytest

from ham import doctor
from ham.conformance import RULES, Subject


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["transformer", "ham"])
def test_compiled_training_equals_eager_training(mixer: str) -> None:
    finding = RULES["compiled"].judge(Subject(mixer, full=True))
    if finding.passed is None:
        pytest.skip(finding.message)
    assert finding.passed, finding.message


def test_without_a_compiler_the_rule_says_why_it_was_not_judged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(doctor, "_compiler", lambda: (False, "no C++ compiler on PATH"))
    finding = RULES["compiled"].judge(Subject("transformer", full=True))
    assert finding.passed is None
    assert finding.message == "torch.compile cannot run here: no C++ compiler on PATH"
    assert RULES["compiled"].judge(Subject("transformer")).passed, "tracing alone needs none"
