"""The list of rules and the runner.

A rule whose premise another rule found broken is not judged: a layer that reads the future also
differs from its own step-by-step form, but only the first of the two says what is wrong.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from ham.conformance import (
    compute,
    costs,
    gradients,
    interface,
    learning,
    portability,
    ragged,
    sequences,
)
from ham.conformance.finding import Finding, not_judged
from ham.conformance.subject import Subject
from ham.errors import unknown_choice
from ham.model.registry import mixer_class


@dataclass(frozen=True)
class Rule:
    """One thing that every mixer must do.

    Attributes:
        function: From the subject to the finding; its name is the rule's.
        after: Rules without which this one means nothing.
        routing_only: Whether it is about mixers that route tokens alone.
    """

    function: Callable[[Subject], Finding]
    after: tuple[str, ...] = ()
    routing_only: bool = False

    @property
    def name(self) -> str:
        """As `--rules` takes it."""
        return self.function.__name__

    @property
    def summary(self) -> str:
        """What it demands, one line."""
        return self.function.__doc__.splitlines()[0]

    def judge(self, subject: Subject) -> Finding:
        """Run the rule; an exception is a failure that names where it was raised."""
        start = time.perf_counter()
        if self.routing_only and not subject.mixer.routes:
            finding = not_judged("the mixer does not route")
            return dataclasses.replace(finding, rule=self.name)
        try:
            finding = self.function(subject)
        except Exception as error:  # any fault of an outside mixer must leave the other rules be
            finding = Finding("", False, message=describe(error))
        seconds = time.perf_counter() - start
        return dataclasses.replace(finding, rule=self.name, seconds=seconds)


_SOUND = ("interface", "shapes", "fresh")
_CAUSAL = (*_SOUND, "causality")
_EQUAL = (*_CAUSAL, "batch", "pieces", "steps")
_JOINED = (*_EQUAL, "join")

_ORDERED = (
    Rule(interface.interface),
    Rule(interface.shapes, ("interface",)),
    Rule(compute.finite, ("interface",)),
    Rule(compute.unwritten, ("interface",)),
    Rule(compute.fresh, ("interface",)),
    Rule(compute.deterministic, ("interface",)),
    Rule(sequences.causality, _SOUND),
    Rule(sequences.batch, _SOUND),
    Rule(sequences.pieces, _CAUSAL),
    Rule(sequences.steps, _CAUSAL),
    Rule(sequences.reorder, _EQUAL),
    Rule(ragged.join, _EQUAL),
    Rule(ragged.join_pieces, _JOINED),
    Rule(ragged.join_again, (*_JOINED, "reorder")),
    Rule(ragged.join_copies, _JOINED),
    Rule(ragged.join_equal, _SOUND),
    Rule(gradients.registered, ("interface",)),
    Rule(gradients.trained, ("interface",)),
    Rule(gradients.gradcheck, _SOUND),
    Rule(gradients.state_dict, _SOUND),
    Rule(costs.bytes_held, _SOUND),
    Rule(costs.flops, ("interface",)),
    Rule(learning.autocast, _SOUND),
    Rule(learning.dial_ends, _SOUND, routing_only=True),
    Rule(learning.repetition, _SOUND),
    Rule(learning.copying, _SOUND),
    Rule(portability.compiled, (*_SOUND, "trained", "registered")),
    Rule(portability.pretrained, (*_SOUND, "registered", "state_dict")),
    Rule(portability.padding, _EQUAL),
)

RULES: dict[str, Rule] = {rule.name: rule for rule in _ORDERED}
"""Every rule by name, each after those it needs."""


def choose_rules(names: Iterable[str] | None = None) -> list[Rule]:
    """The rules called `names`, in the order they run; all of them when None.

    Raises:
        ConfigError: For an unknown name; the message lists the rules.
    """
    if names is None:
        return list(RULES.values())
    wanted = set(names)
    for name in sorted(wanted - set(RULES)):
        raise unknown_choice("rule", name, RULES)
    return [rule for rule in RULES.values() if rule.name in wanted]


def check(
    mixer: str,
    device: str = "cpu",
    rules: Sequence[str] | None = None,
    full: bool = False,
    report: Callable[[str], None] = lambda rule: None,
) -> list[Finding]:
    """Run rules on a registered mixer; torch's random state is left as it was.

    Args:
        mixer: Registered name.
        device: Where to run.
        rules: Names of `RULES`; all of them when None.
        full: As in `Subject`.
        report: Called with the name of each rule when it is done.

    Raises:
        ConfigError: For an unknown mixer or rule.
    """
    mixer_class(mixer)
    chosen, subject = choose_rules(rules), Subject(mixer, device, full)
    failed: set[str] = set()
    findings = []
    with torch.random.fork_rng():
        for rule in chosen:
            broken = [name for name in rule.after if name in failed]
            if broken:
                finding = not_judged(f"means nothing while {broken[0]} fails")
                finding = dataclasses.replace(finding, rule=rule.name)
            else:
                finding = rule.judge(subject)
            findings.append(finding)
            if finding.passed is False:
                failed.add(rule.name)
            report(rule.name)
    return findings


def describe(error: Exception) -> str:
    """Type, message and innermost line of an exception, in one line."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())
    return f"raised {type(error).__name__}: {text} ({frame.filename}:{frame.lineno})"
