"""A deliberately broken mixer for each rule is caught by exactly that rule."""

from __future__ import annotations

import re

import pytest
import torch
from mutants import MUTANTS

from ham.baselines.transformer import Transformer
from ham.conformance import RULES, Finding, check
from ham.conformance.finding import Judge
from ham.model.registry import register_baseline

pytestmark = pytest.mark.usefixtures("own_registry")

# These take longer than all others together; each is tried on the mutants it should catch alone.
SLOW = {"repetition", "copying", "compiled"}
# What the message must name: the tensor, the place, or how far.
NAMED = {
    "causality": r"logits when token \d+ changes at sequence 0, token \d+, logit \d+: .* limit 0\)",
    "fresh": r"logits of \w+ after another sequence at sequence \d, token \d+, logit \d+",
    "bytes_held": r"\d+ bytes in all declared, \d+ held after 1 tokens .* \(2 bytes, limit 0\)",
    "trained": "blocks.0.mixer.dead gets no gradient",
    "batch": r"logits of sequence \d among others at sequence 0, token \d+",
    "finite": "forward of zeros: the first at sequence 0, token 0, channel 0",
    "registered": r"a trained tensor of shape \(32,\) is not registered",
    "interface": "Mutant.(uses_hints|routes) is true, but",
    "copying": "after 300 steps; guessing gives 0.875",
    "compiled": r"aot_eager: .* data-dependent .*mutants.py:\d+|by aot_eager, logits at sequence",
    "pretrained": "logits after from_pretrained at sequence",
    "gradcheck": "slope along a random direction of the input",
}


def findings_of(mutant: type, rule: str) -> dict[str, Finding]:
    register_baseline("mutant")(type("Mutant", (mutant,), {}))
    judged = [name for name in RULES if name == rule or name not in SLOW]
    return {finding.rule: finding for finding in check("mutant", rules=judged)}


@pytest.mark.parametrize(
    ("rule", "mutant"),
    [(rule, mutant) for rule, mutants in MUTANTS.items() for mutant in mutants],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_mutant_is_caught_by_the_rule_that_should(rule: str, mutant: type) -> None:
    findings = findings_of(mutant, rule)
    assert [name for name, one in findings.items() if one.passed is False] == [rule]
    message = findings[rule].message
    assert message and "raised" not in message
    if rule in NAMED:
        assert re.search(NAMED[rule], message), message
    for name, finding in findings.items():
        if finding.passed is None and name != "dial_ends":
            assert rule in RULES[name].after


def test_memory_that_nobody_wrote() -> None:
    class Reads(Transformer):
        def step(self, x_BD, state):
            return super().step(x_BD, state) + 0 * x_BD.new_empty(x_BD.shape)

    register_baseline("mutant")(Reads)
    (finding,) = check("mutant", rules=["unwritten"])
    assert finding.passed is False and "step 0: the first at sequence 0" in finding.message


def test_a_missing_method_is_named_and_nothing_else_is_judged() -> None:
    class Unfinished(Transformer):
        """As a class is that does not define one of the abstract methods."""

    Unfinished.__abstractmethods__ = frozenset({"decode_flops"})
    register_baseline("mutant")(Unfinished)
    first, *others = check("mutant")
    assert first.message == "Unfinished lacks decode_flops"
    assert all(finding.passed is None for finding in others)


def test_an_exception_is_a_finding() -> None:
    class Raises(Transformer):
        def step(self, x_BD, state):
            raise KeyError("no step yet")

    register_baseline("mutant")(Raises)
    (finding,) = check("mutant", rules=["steps"])
    assert finding.passed is False
    assert "raised KeyError: 'no step yet'" in finding.message and __file__ in finding.message


def test_checking_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    check("transformer", rules=["flops"])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_judge_takes_what_is_not_a_number_for_infinitely_far() -> None:
    judge = Judge(0.5)
    judge.same("x", torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0]), "T", first_token=9)
    assert judge.measured == float("inf") and "x at token 10: nan" in judge.message
    other = Judge(0.5)
    other.same("x", torch.ones(2), torch.ones(3))
    assert not other.finding().passed
    close = Judge(0.5)
    close.same("x", torch.tensor([2.0]), torch.tensor([1.0]))
    assert close.finding().passed and close.measured == 0.5
    infinite = Judge(0.5)
    infinite.same("x", torch.tensor([float("inf")]), torch.tensor([float("inf")]))
    assert infinite.finding().passed
