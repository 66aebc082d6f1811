"""Verdicts: supported, refuted, inconclusive or not run.

Over seeds, the two-sided t interval at Holm's level decides: wholly beyond the bound on every
comparison supports, wholly short of it on one refutes. Timings have repeats, which are no seeds:
they are judged in cells (places of a sweep that were measured apart), at least three, each by the
ratio of medians and by the range that the 20th to 80th percentiles of both sides allow. Supported:
every cell's whole range is beyond δ; refuted: at least three cells' whole ranges are short of it;
beyond in some and short in one or two: inconclusive and mixed, with the place from which on it
holds. Anything else, and anything with fewer than three seeds or cells, is inconclusive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ham.claims.config import Claim, Claims, Test
from ham.claims.evidence import Observation
from ham.claims.measure import Kept, Measured, measure
from ham.claims.mixed import HoldsFrom, holds_from, mixed_words
from ham.report.inference import (
    MIN_SEEDS,
    Margins,
    holm_adjusted,
    holm_levels,
    joint_p,
    settling_n,
)
from ham.report.statistics import Estimate, mean

Verdict = Literal["supported", "refuted", "inconclusive", "not run"]
SUPPORTED, REFUTED, INCONCLUSIVE, NOT_RUN = "supported", "refuted", "inconclusive", "not run"
VERDICTS = (SUPPORTED, REFUTED, INCONCLUSIVE, NOT_RUN)
UNCORRECTED = 0.05


@dataclass(frozen=True)
class Judged:
    """One test with its verdict.

    Attributes:
        level: Probability with which the interval misses, after Holm.
        p, p_adjusted: Two-sided p-value against the bound, alone and within the family; None where
            there is no decision to make.
        effect: The comparison that decides: the one nearest to failing.
        decisive: Its name.
        bound: What the effect is asked to exceed.
        settles_at: The n that would settle an inconclusive test, or None.
        kept: What the sides that route keep of the tokens.
        holds_from: For timings that hold in some cells and fall short in others: by coordinate,
            from where on they hold; None for all others.
        blocked: Whether something other than n and spread stands against a decision.
        reason: Why there is no decision, or what should be known.
    """

    claim: str
    test: Test
    verdict: Verdict
    n: int
    level: float
    effect: Estimate | None = None
    decisive: str = ""
    bound: float | None = None
    p: float | None = None
    p_adjusted: float | None = None
    settles_at: int | None = None
    reason: str = ""
    runs: tuple[str, ...] = ()
    kept: tuple[Kept, ...] = ()
    holds_from: HoldsFrom | None = None
    blocked: bool = False


@dataclass(frozen=True)
class JudgedClaim:
    """A claim: supported if all of its tests are, refuted if one is."""

    claim: Claim
    tests: tuple[Judged, ...]

    @property
    def verdict(self) -> Verdict:
        """The verdict over all tests."""
        verdicts = [test.verdict for test in self.tests]
        if REFUTED in verdicts:
            return REFUTED
        for whole in (SUPPORTED, NOT_RUN):
            if all(verdict == whole for verdict in verdicts):
                return whole
        return INCONCLUSIVE


def judge(claims: Claims, evidence: Sequence[Observation]) -> list[JudgedClaim]:
    """Judge every claim. Tests of a family that were not run count in its correction."""
    keyed = [(claim, test) for claim in claims.claims for test in claim.tests]
    measured = [measure(test, evidence) for _, test in keyed]
    p_values = [joint_p(one.margins) if _has_p(one) else None for one in measured]
    levels, adjusted = _correct(claims, [test for _, test in keyed], p_values)
    judged: dict[str, list[Judged]] = {}
    for index, (claim, test) in enumerate(keyed):
        one = _judge_test(claim, test, measured[index], levels[index])
        if p_values[index] is not None:
            one = replace(one, p=p_values[index], p_adjusted=adjusted[index])
        judged.setdefault(claim.id, []).append(one)
    return [JudgedClaim(claim, tuple(judged[claim.id])) for claim in claims.claims]


def _has_p(one: Measured) -> bool:
    return one.decidable and bool(one.margins)


def _correct(
    claims: Claims, tests: list[Test], p_values: list[float | None]
) -> tuple[list[float], list[float]]:
    """Levels and adjusted p-values; a test without a p-value counts as one of 1."""
    levels = [UNCORRECTED] * len(tests)
    adjusted = [1.0 if p is None else p for p in p_values]
    for name, family in claims.families.items():
        members = [index for index, test in enumerate(tests) if test.family == name]
        known = [adjusted[index] for index in members]
        for index, level, p in zip(
            members, holm_levels(known, family.alpha), holm_adjusted(known), strict=True
        ):
            levels[index], adjusted[index] = level, p
    return levels, adjusted


def _judge_test(claim: Claim, test: Test, found: Measured, level: float) -> Judged:
    common = {"claim": claim.id, "test": test, "n": found.n, "level": level}
    common |= {"runs": tuple(found.runs), "kept": tuple(found.kept)}
    common["blocked"] = bool(found.problems)
    words = [*found.problems, *found.notes, *_later_than_rows(claim, test, found)]
    if not found.ran:
        return Judged(verdict=NOT_RUN, reason="; ".join(words), **common)
    if found.n < MIN_SEEDS and not found.problems:
        unit = "cells" if test.test == "timing" else "seeds"
        words.insert(0, f"a decision needs at least {MIN_SEEDS} {unit}")
    if found.cells:
        return _judge_cells(test, found, words, common)
    if not found.margins:
        return Judged(verdict=INCONCLUSIVE, reason="; ".join(words), **common)
    return _judge_margins(found, words, common)


def _later_than_rows(claim: Claim, test: Test, found: Measured) -> list[str]:
    """Marks of what was stated after the rows were there, and may have been made to fit."""
    stated = {"the claim": claim.stated}
    if test.same_fraction:
        stated["its condition on tokens kept"] = test.same_fraction.stated
    if test.same_metric:
        stated[f"its condition on {test.same_metric.where.quantity}"] = test.same_metric.stated
    return [
        f"rows are from before {what} was stated ({when:%Y-%m-%d})"
        for what, when in stated.items()
        if when
        and found.oldest is not None
        and found.oldest < when
        # What was stated with the claim needs no mark of its own.
        and (when > claim.stated or what == "the claim")
    ]


def _judge_margins(found: Measured, words: list[str], common: dict) -> Judged:
    level, parts = common["level"], found.margins
    verdict = INCONCLUSIVE
    if found.decidable:
        # One part that fails refutes, so its level is shared out among the parts.
        short = [part for part in parts if part.refutes and _short(part, level / len(parts))]
        if short:
            verdict, parts, level = REFUTED, short, level / len(parts)
        elif all(part.supports and _beyond(part, level) for part in parts):
            verdict = SUPPORTED
    weakest = min(parts, key=lambda part: _slack(part, level))
    open_ended = verdict == INCONCLUSIVE and not found.problems
    unreachable = open_ended and not _may_settle(parts, weakest)
    settles = open_ended and not unreachable
    return Judged(
        **{**common, "level": level, "blocked": common["blocked"] or unreachable},
        verdict=verdict,
        effect=weakest.interval(level),
        decisive=weakest.name,
        bound=weakest.bound,
        settles_at=settling_n(weakest.values, weakest.bound, level) if settles else None,
        reason="; ".join(words),
    )


def _may_settle(parts: Sequence[Margins], weakest: Margins) -> bool:
    """Whether the outcome that the weakest part leans to may be decided at all."""
    if mean(weakest.values) > weakest.bound:
        return all(part.supports for part in parts)
    return weakest.refutes


def _beyond(part: Margins, level: float) -> bool:
    low = part.interval(level).low
    return low is not None and low > part.bound


def _short(part: Margins, level: float) -> bool:
    high = part.interval(level).high
    return high is not None and high < part.bound


def _slack(part: Margins, level: float) -> float:
    """How far the lower end lies beyond the bound; the mean where one seed gives no interval."""
    estimate = part.interval(level)
    return (estimate.value if estimate.low is None else estimate.low) - part.bound


def _judge_cells(test: Test, found: Measured, words: list[str], common: dict) -> Judged:
    asked = test.delta.value
    short = [cell for cell in found.cells if cell.factor.high < asked]
    beyond = [cell for cell in found.cells if cell.factor.low > asked]
    words.insert(0, f"{len(beyond)} of {len(found.cells)} cells beyond, {len(short)} short")
    verdict, held = INCONCLUSIVE, None
    if found.decidable:
        if len(short) >= MIN_SEEDS:
            verdict = REFUTED
        elif len(beyond) == len(found.cells):
            verdict = SUPPORTED
        elif short and beyond:
            held = holds_from(found.cells, asked)
            words.insert(1, mixed_words(found.cells, short, held))
    weakest = min(found.cells, key=lambda cell: cell.factor.value)
    return Judged(
        **common,
        verdict=verdict,
        effect=weakest.factor,
        decisive=weakest.name,
        bound=asked,
        holds_from=held,
        reason="; ".join(words),
    )
