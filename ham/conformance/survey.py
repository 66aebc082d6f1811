"""The rules on many mixers: what fails in one of them leaves the others alone.

An exception while a mixer is found or judged is its own failure. All run in one process, so that
large imports are paid once; a fault that breaks a CUDA context breaks it for those after it too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ham.conformance.finding import Finding
from ham.conformance.suite import RULES, check, describe
from ham.errors import ConfigError


@dataclass(frozen=True)
class Examined:
    """One mixer.

    Attributes:
        name: Registered name, or the source that could not be read.
        findings: One for each rule; none where the rules could not be run.
        error: Why they could not; empty otherwise.
        seconds: How long all of it took.
    """

    name: str
    findings: list[Finding] = field(default_factory=list)
    error: str = ""
    seconds: float = 0.0

    @property
    def broken(self) -> list[Finding]:
        """The rules that it breaks."""
        return [finding for finding in self.findings if finding.passed is False]

    @property
    def kept(self) -> int:
        """The number of rules that it keeps."""
        return sum(finding.passed is True for finding in self.findings)

    @property
    def failed(self) -> bool:
        """Whether it breaks a rule, or could not be judged at all."""
        return bool(self.error or self.broken)


def survey(
    names: Iterable[str],
    device: str = "cpu",
    rules: Sequence[str] | None = None,
    full: bool = False,
    report: Callable[[str, str], None] = lambda name, rule: None,
) -> list[Examined]:
    """Run the rules on each mixer; arguments as `check`.

    Args:
        names: Registered names.
        report: Called with mixer and rule after each rule.
    """
    examined = []
    for name in names:
        begin = time.perf_counter()
        findings, error = [], ""
        try:
            findings = check(name, device, rules, full, lambda rule, of=name: report(of, rule))
        except ConfigError as fault:
            error = str(fault)
        except Exception as fault:  # whatever one of them raises is no fault of the others
            error = describe(fault)
        examined.append(Examined(name, findings, error, time.perf_counter() - begin))
    return examined


def grid(examined: Sequence[Examined]) -> list[list[str]]:
    """Headings, then a row for each rule: limit, unit, and a figure for each mixer.

    A figure says by how much the rule was kept; `FAILED` stands before it where it was not, a dash
    where the rule was not judged and a question mark where nothing could be.
    """
    rows = [["rule", "limit", "unit", *(one.name for one in examined)]]
    by_name = [{finding.rule: finding for finding in one.findings} for one in examined]
    for rule in RULES:
        found = [findings.get(rule) for findings in by_name]
        known = [finding for finding in found if finding is not None]
        if not known:
            continue
        judged = next((f for f in known if f.limit == f.limit), None)
        limit, unit = (f"{judged.limit:g}", judged.unit) if judged else ("-", "")
        rows.append([rule, limit, unit, *(_figure(finding) for finding in found)])
    return rows


def _figure(finding: Finding | None) -> str:
    if finding is None:
        return "?"
    if finding.passed is None:
        return "-"
    measured = f"{finding.measured:.2g}" if finding.measured == finding.measured else ""
    return measured if finding.passed else f"FAILED {measured}".strip()
