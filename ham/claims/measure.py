"""From rows to what a test measured: one margin a seed and comparison, or one factor a cell.

A test that lacks a side was not run. A test whose rows are there but incomplete, ambiguous, failed,
from a smoke run or from several runs has problems, and problems forbid a decision. So does a task
at which every model has the same number: that one is not better there says nothing of the models.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from ham.claims.conditions import Checked, check_fraction, check_metric
from ham.claims.config import RELATIVE, Side, Test, Where
from ham.claims.evidence import Observation
from ham.claims.query import Gathered, coordinate, gather, select, value_of, why_nothing
from ham.claims.timings import Cell, factors
from ham.report.formats import join_words
from ham.report.inference import MIN_SEEDS, Margins
from ham.report.metrics import better_direction
from ham.report.statistics import mean

SMOKE = "rows of a smoke run prove nothing"


@dataclass(frozen=True)
class Kept:
    """The realised share of tokens in the cache of one side: its mean, and over the grid."""

    side: str
    mean: float
    low: float
    high: float


@dataclass
class Measured:
    """What the rows say about one test.

    Attributes:
        ran: Whether every side has rows.
        margins: Per comparison one effect a seed; good is large.
        cells: Per cell the factor of a timing, with its range.
        kept: What the sides that route keep of the tokens.
        n: Seeds, or cells of a timing.
        problems: Why there can be no decision.
        notes: What a reader should know besides.
        runs: The runs that the rows are from.
        oldest: When the first of the jobs behind the rows began, as far as known.
    """

    ran: bool = True
    margins: list[Margins] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)
    n: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    oldest: datetime | None = None

    @property
    def decidable(self) -> bool:
        """Whether there is enough, and nothing against it."""
        return self.ran and not self.problems and self.n >= MIN_SEEDS


def measure(test: Test, evidence: Sequence[Observation]) -> Measured:
    """Evaluate one test; rows of smoke runs are looked at only where there are no others."""
    real = [one for one in evidence if not one.smoke]
    result = _measure(test, real)
    if result.ran or len(real) == len(evidence):
        return result
    result = _measure(test, evidence)
    if result.ran:
        result.problems.append(SMOKE)
    return result


def _measure(test: Test, evidence: Sequence[Observation]) -> Measured:
    sides = [*test.arms, *test.reference]
    found = [select(evidence, test.where, side) for side in sides]
    missing = [side for side, rows in zip(sides, found, strict=True) if not rows]
    if missing:
        notes = [why_nothing(evidence, test.where, missing[0])]
        if len(missing) > 1:
            notes.append(f"none of {join_words([side.name for side in missing[1:]])} either")
        return Measured(ran=False, notes=notes)
    if test.test == "timing":
        return _timing(test, found)
    shared = set.intersection(*({one.run for one in rows} for rows in found))
    if not shared:
        names = join_words([side.name for side in sides])
        return Measured(ran=False, notes=[f"no run has rows of all of {names}"])
    result = Measured(runs=sorted(shared), oldest=_oldest(found, shared))
    if len(shared) > 1:
        result.problems.append(
            f"several runs have such rows ({join_words(result.runs)}); give one of them, or name "
            "its configuration in the claim"
        )
        return result
    own = [[one for one in rows if one.run in shared] for rows in found]
    gathered = _over_seeds(result, test, sides, own)
    if not result.margins:
        return result
    if test.test != "monotone" or isinstance(test.arm, list):
        for side in gathered:
            result.kept += _kept(side.name, (side.shares() or {}).values())
    if test.same_fraction:
        _take(result, check_fraction(test, gathered, result.margins))
    if test.same_metric and not result.problems:
        run = [one for one in evidence if one.run in shared]
        _take(result, check_metric(test, gathered, result.margins, run))
    return result


def _kept(side: str, shares: Iterable[float | None]) -> list[Kept]:
    """What a side keeps; nothing where it does not route or a row does not tell."""
    known = list(shares)
    if not known or None in known:
        return []
    return [Kept(side, mean(known), min(known), max(known))]


def _take(result: Measured, checked: Checked) -> None:
    result.margins = checked.margins
    result.problems += checked.problems
    result.notes += checked.notes


def _oldest(found: list[list[Observation]], runs: Iterable[str]) -> datetime | None:
    times = [one.started for rows in found for one in rows if one.run in runs and one.started]
    return min(times, default=None)


def _over_seeds(
    result: Measured, test: Test, sides: list[Side], found: list[list[Observation]]
) -> list[Gathered]:
    """Fill in margins over the seeds that all sides share; the rows of these seeds."""
    where = test.where
    grid = {coordinate(one.row, where) for rows in found for one in rows}
    along_x = test.test == "monotone" and not isinstance(test.arm, list)
    gathered = [gather(r, where, s, grid) for r, s in zip(found, sides, strict=True)]
    for side in gathered:
        result.problems += side.problems
        result.notes += side.notes
    seeds = sorted(set.intersection(*(set(side.by_seed) for side in gathered)))
    result.n = len(seeds)
    alone = sorted(set().union(*(side.by_seed for side in gathered)) - set(seeds))
    if alone:
        result.notes.append(f"without a partner: seed {join_words([str(s) for s in alone])}")
    for side in gathered:
        side.by_seed = {seed: side.by_seed[seed] for seed in seeds}
    if not seeds or result.problems:
        return gathered
    if along_x:
        result.margins = _curve_margins(test, _curve_over_x(gathered[0], where, seeds), result)
        return gathered
    per_side = [[side.values(where)[seed] for seed in seeds] for side in gathered]
    if test.test == "monotone":
        named = [(side.name, values) for side, values in zip(sides, per_side, strict=True)]
        result.margins = _curve_margins(test, named, result)
    elif problem := _no_comparison(test, per_side):
        result.problems.append(problem)
    else:
        result.margins = _comparisons(test, per_side)
    return gathered


def _no_comparison(test: Test, per_side: list[list[float]]) -> str | None:
    """Why values cannot be compared, or None."""
    if test.delta.unit == RELATIVE and any(0 in values for values in per_side[1:]):
        return "a reference is 0, so that nothing is relative to it"
    if test.test == "superiority" and len({v for values in per_side for v in values}) == 1:
        return (
            f"every model has {per_side[0][0]:g} with every seed: a floor or a ceiling tells "
            "nothing apart"
        )
    return None


def _comparisons(test: Test, per_side: list[list[float]]) -> list[Margins]:
    """The arm against each reference, or against the number that it must reach."""
    sign = 1 if better_direction(test.where.quantity) == "higher" else -1
    arm, *references = per_side
    delta = test.delta.value
    if test.test == "threshold":
        values = tuple(sign * (value - delta) for value in arm)
        return [Margins(f"beyond {delta:g}", values, 0.0)]
    bound = delta if test.test == "superiority" else -delta
    margins = []
    for side, values in zip(test.reference, references, strict=True):
        effects = [sign * (ours - theirs) for ours, theirs in zip(arm, values, strict=True)]
        if test.delta.unit == RELATIVE:
            effects = [e / abs(theirs) for e, theirs in zip(effects, values, strict=True)]
        margins.append(Margins(f"against {side.name}", tuple(effects), bound))
    return margins


def _curve_over_x(side: Gathered, where: Where, seeds: list[int]) -> list[tuple[str, list[float]]]:
    xs = sorted({row.x_value for rows in side.by_seed.values() for row in rows.values()} - {None})
    curve = []
    for x in xs:
        values = [
            mean([value_of(r, where) for r in side.by_seed[seed].values() if r.x_value == x])
            for seed in seeds
        ]
        curve.append((f"{x:g}", values))
    return curve


def _curve_margins(
    test: Test, curve: list[tuple[str, list[float]]], result: Measured
) -> list[Margins]:
    """Each step's gain above -delta, and none above its largest share of the whole gain."""
    if len(curve) < test.points:
        result.problems.append(f"the curve has {len(curve)} points; it needs {test.points}")
        return []
    sign = 1 if better_direction(test.where.quantity) == "higher" else -1
    steps = {
        f"step {first} to {second}": [sign * (y - x) for x, y in zip(before, after, strict=True)]
        for (first, before), (second, after) in itertools.pairwise(curve)
    }
    margins = [Margins(name, tuple(gain), -test.delta.value) for name, gain in steps.items()]
    if test.largest_step is not None:
        whole = [sum(gains) for gains in zip(*steps.values(), strict=True)]
        margins += [
            Margins(
                f"{name} below {test.largest_step:g} of the whole gain",
                tuple(test.largest_step * w - g for w, g in zip(whole, gain, strict=True)),
                0.0,
            )
            for name, gain in steps.items()
        ]
    return margins


def _timing(test: Test, found: list[list[Observation]]) -> Measured:
    """Factors by cell."""
    timed = factors(test, found)
    result = Measured(cells=timed.cells, n=len(timed.cells), runs=timed.runs, notes=timed.notes)
    if not timed.cells:
        result.problems.append("no cell has a time of both sides that counts")
    for side, rows in zip([*test.arms, *test.reference], found, strict=True):
        shares = [one.row.kv_fraction for one in rows if one.row.value is not None]
        result.kept += _kept(side.name, shares)
    result.oldest = _oldest(found, timed.runs)
    return result
