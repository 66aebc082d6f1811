"""What every registered mixer must do; a new baseline is covered by being registered."""

from __future__ import annotations

import pytest

from ham.conformance import RULES, Subject
from ham.model.registry import registered_mixers


def test_the_architectures_are_registered() -> None:
    recurrent = {"gated_delta_rule", "gated_delta_rule_window", "mamba2"}
    assert {"ham", "transformer", "sliding_window", *recurrent} <= set(registered_mixers())


@pytest.mark.parametrize("rule", list(RULES))
@pytest.mark.parametrize("mixer", sorted(registered_mixers()))
def test_every_mixer_keeps_every_rule(mixer: str, rule: str) -> None:
    finding = RULES[rule].judge(Subject(mixer))
    assert finding.passed is not False, finding.message


def test_only_mixers_that_do_not_route_are_spared_a_rule() -> None:
    for name, mixer in registered_mixers().items():
        assert (RULES["dial_ends"].judge(Subject(name)).passed is None) == (not mixer.routes)
