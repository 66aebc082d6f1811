"""A configuration of the reference, its rivals as they are, and its rivals as matched."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

from ham.config import ArmConfig
from ham.config_files import parse_config
from ham.matching.bench import Bench
from ham.matching.budgets import Match
from ham.matching.search import Refusal
from ham.model.sizing import model_config

WIDTH = 96


@dataclass
class WrittenArm:
    """An arm of the configuration with the comments above it; comments alone without one."""

    arm: ArmConfig | None
    comments: list[str]


def matched_config(bench: Bench, matches: Sequence[Match], command: str) -> str:
    """The text of a configuration file; every arm in it can be built at equal parameters.

    A budget that was not met leaves no arm but a comment that says why.

    Args:
        bench: The reference.
        matches: Of all rivals.
        command: What made it, for the first line.

    Raises:
        ConfigError: If the experiment without its arms is not valid.
    """
    config = bench.config
    values = config.model_dump(mode="json", exclude_unset=True, exclude={"arms"})
    values["name"] = f"{config.name}-matched"
    values["title"] = f"{config.title or config.name}, matched to {bench.reference.name}"
    values["model"] = {**values.get("model", {}), "match_parameters": True}
    lines = [
        f"# Written by `{command}`.",
        f"# Bytes: all that decoding has allocated for one sequence, {bench.element_size} bytes an "
        "element of keys and values.",
        yaml.safe_dump(values, sort_keys=False, allow_unicode=True).rstrip(),
        "arms:",
    ]
    for written in matched_arms(bench, matches):
        for comment in written.comments:
            wrapped = textwrap.wrap(comment, WIDTH, break_on_hyphens=False)
            lines += [f"  # {line}" for line in wrapped]
        if written.arm is not None:
            lines.append(f"  - {_flow(written.arm)}")
    text = "\n".join(lines) + "\n"
    checked = parse_config(yaml.safe_load(text), source="the matched configuration")
    for arm in checked.check_registry().arms:
        model_config(checked, arm, bench.vocabulary_size)
    return text


def matched_arms(bench: Bench, matches: Sequence[Match]) -> list[WrittenArm]:
    """The reference, then every rival as it is and as matched, each model once."""
    reference = WrittenArm(bench.reference, ["The arm that the others are matched to."])
    as_they_are = {match.rival.name: match.rival for match in matches}
    own = {name: [_as_it_is(bench, rival)] for name, rival in as_they_are.items()}
    for match in matches:
        comment = f"{match.rival.name}, {_describe(match)}"
        others = [entry for entries in own.values() for entry in entries]
        same = [entry for entry in (reference, *others) if _same_model(entry.arm, match.arm)]
        if not match.matched:
            own[match.rival.name].append(WrittenArm(None, [f"Left out: {comment}"]))
        elif same:
            same[0].comments.append(comment)
        else:
            own[match.rival.name].append(WrittenArm(match.arm, [comment]))
    return [reference, *(entry for entries in own.values() for entry in entries)]


def _describe(match: Match) -> str:
    """One line: the budget, the knob with its value, what was wanted and what it came to."""
    got = "nothing can be used"
    if match.got is not None:
        difference = 100 * match.difference(match.got)
        got = f"{match.number(match.got)} with {match.knob} {match.value} ({difference:+.2f} %)"
    text = f"{match.label}: wanted {match.number(match.wanted)}, {got}"
    return text if match.matched else f"{text}; {match.limit}"


def _as_it_is(bench: Bench, rival: ArmConfig) -> WrittenArm:
    measured = bench.measure(rival)
    fault = measured.reason if isinstance(measured, Refusal) else measured.sizing.fault
    if fault:
        return WrittenArm(None, [f"Left out: {rival.name} as it is: {fault}"])
    return WrittenArm(rival, [])


def _same_model(one: ArmConfig | None, other: ArmConfig | None) -> bool:
    if one is None or other is None:
        return False
    return one.model_dump(exclude={"name"}) == other.model_dump(exclude={"name"})


def _flow(arm: ArmConfig) -> str:
    """The arm on one line, as YAML."""
    values = arm.model_dump(mode="json", exclude_unset=True)
    text = yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=math.inf)
    return text.strip()
