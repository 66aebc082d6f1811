"""What must hold beside a comparison: tokens kept, and bytes of the cache.

A difference in what both sides keep counts against the side that keeps more: if the arm does, the
comparison cannot support its claim; if the reference does, the comparison cannot refute it. The
other way round it is conservative and may decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from ham.claims.config import SameMetric, Side, Test
from ham.claims.evidence import Observation
from ham.claims.query import Gathered, select, value_of, why_nothing
from ham.report.formats import join_words
from ham.report.inference import Margins
from ham.report.metrics import unit
from ham.report.rows import Row
from ham.report.statistics import mean

LENGTHS = ("context", "length")
"""Horizontal coordinates that are the length of a row's text in tokens."""


@dataclass
class Checked:
    """Comparisons after a condition: what they may still decide, and what a reader should know."""

    margins: list[Margins]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_fraction(test: Test, gathered: Sequence[Gathered], margins: list[Margins]) -> Checked:
    """The realised share of tokens in the cache, at every place of the grid."""
    allowed = test.same_fraction.value
    arm, *references = gathered
    ours = arm.shares()
    result = Checked([])
    for part, side in zip(margins, references, strict=True):
        theirs = side.shares()
        if ours is None or theirs is None:
            result.problems.append(f"rows of {arm.name} or {side.name} carry no kv_fraction")
            result.margins.append(part)
            continue
        gaps = [ours[place] - theirs[place] for place in ours]
        more, fewer = max(gaps) > allowed, min(gaps) < -allowed
        result.margins.append(_limited(part, more, fewer))
        if more or fewer:
            shares = f"{_percent(arm.kv_fraction())} against {_percent(side.kv_fraction())}"
            result.notes.append(_difference(side.name, more, fewer, shares))
    return result


def _limited(part: Margins, more: bool, fewer: bool) -> Margins:
    return replace(part, supports=part.supports and not more, refutes=part.refutes and not fewer)


def _difference(name: str, more: bool, fewer: bool, shares: str) -> str:
    if more and fewer:
        return f"tokens kept differ from {name} both ways over the grid ({shares}): no decision"
    which, may = ("more", "refute, not support") if more else ("fewer", "support, not refute")
    return f"with {which} tokens kept ({shares} of {name}): may {may}"


def check_metric(
    test: Test,
    gathered: Sequence[Gathered],
    margins: list[Margins],
    evidence: Sequence[Observation],
) -> Checked:
    """Another number, such as bytes of the cache, must agree with that of each reference."""
    same, result = test.same_metric, Checked(margins)
    measured: list[list[Row]] = []
    for side in (*test.arms, *test.reference):
        rows = [one.row for one in select(evidence, same.where, side)]
        if not rows or any(value_of(row, same.where) is None for row in rows):
            why = "failed" if rows else why_nothing(evidence, same.where, side)
            what = f"{same.where.quantity} of {side.name}"
            result.problems.append(f"{what} cannot be compared: {why}")
            return result
        measured.append(rows)
    result.problems += _unequal(same, [*test.arms, *test.reference], measured)
    if same.own_length and not result.problems:
        _check_own_length(same, gathered, measured, result)
    return result


def _unequal(same: SameMetric, sides: Sequence[Side], measured: list[list[Row]]) -> list[str]:
    ours, *others = [mean([value_of(row, same.where) for row in rows]) for rows in measured]
    problems = []
    for side, theirs in zip(sides[1:], others, strict=True):
        off = abs(ours - theirs) / abs(theirs) if theirs else float("inf")
        if off > same.tolerance:
            problems.append(
                f"{same.where.quantity} differs by {100 * off:.1f} %: {sides[0].name} {ours:,.0f}, "
                f"{side.name} {theirs:,.0f}; allowed {100 * same.tolerance:g} %"
            )
    return problems


def _check_own_length(
    same: SameMetric, gathered: Sequence[Gathered], measured: list[list[Row]], result: Checked
) -> None:
    """The number must be that of the task: of its length, and with as many tokens kept.

    Bytes that agree after 2,048 tokens do not at other lengths: a window stops growing, and a
    threshold keeps other shares of other texts.
    """
    what = unit(same.where.quantity)
    lengths = {_length(row) for rows in measured for row in rows}
    own = {_length(row) for side in gathered for row in side.rows()}
    if own != lengths or None in own:
        result.problems.append(
            f"{what} differ on this task: they were matched at {_tokens(lengths)}, its texts have "
            f"{_tokens(own)}"
        )
    for index, (side, rows) in enumerate(zip(gathered, measured, strict=True)):
        here, there = side.kv_fraction(), _share_of(rows)
        if here is None or there is None or abs(here - there) <= same.tolerance * there:
            continue
        more = here > there
        result.notes.append(
            f"{side.name} with {'more' if more else 'fewer'} {what} than were matched "
            f"({_percent(here)} of tokens kept here, {_percent(there)} there)"
        )
        # The arm is compared with every reference, a reference only with the arm.
        result.margins = [
            _limited(part, more == (index == 0), more != (index == 0))
            if index in (0, place)
            else part
            for place, part in enumerate(result.margins, start=1)
        ]


def _tokens(lengths: set[float | None]) -> str:
    if None in lengths:
        return "a length that their rows do not give"
    return f"{join_words([f'{length:,.0f}' for length in sorted(lengths)])} tokens"


def _length(row: Row) -> float | None:
    return row.x_value if row.x_name in LENGTHS else None


def _share_of(rows: Sequence[Row]) -> float | None:
    shares = [row.kv_fraction for row in rows]
    return None if None in shares else mean(shares)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
