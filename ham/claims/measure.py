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

from ham.claims.config import RELATIVE, SameMetric, Side, Test, Where
from ham.claims.evidence import Observation
from ham.claims.query import (
    Gathered,
    coordinate,
    gather,
    select,
    timing_fault,
    value_of,
    why_nothing,
)
from ham.report.formats import join_words
from ham.report.inference import MIN_SEEDS, Margins
from ham.report.metrics import better_direction
from ham.report.rows import Row
from ham.report.statistics import Estimate, mean

SMOKE = "rows of a smoke run prove nothing"


@dataclass
class Measured:
    """What the rows say about one test.

    Attributes:
        ran: Whether every side has rows.
        margins: Per comparison one effect a seed; good is large.
        cells: Per cell the factor of a timing, with its range.
        n: Seeds, or cells of a timing.
        problems: Why there can be no decision.
        notes: What a reader should know besides.
        runs: The runs that the rows are from.
        oldest: When the first of the jobs behind the rows began, as far as known.
    """

    ran: bool = True
    margins: list[Margins] = field(default_factory=list)
    cells: list[tuple[str, Estimate]] = field(default_factory=list)
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
        result = _timing(test, found)
        result.oldest = _oldest(found, result.runs)
        return result
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
    _over_seeds(result, test, sides, own)
    if test.same_metric and not result.problems:
        run = [one for one in evidence if one.run in shared]
        _check_same_metric(result, test.same_metric, test.arms[0], test.reference, run)
    return result


def _oldest(found: list[list[Observation]], runs: Iterable[str]) -> datetime | None:
    times = [one.started for rows in found for one in rows if one.run in runs and one.started]
    return min(times, default=None)


def _over_seeds(
    result: Measured, test: Test, sides: list[Side], found: list[list[Observation]]
) -> None:
    """Fill in margins over the seeds that all sides share."""
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
    if not seeds or result.problems:
        return
    if along_x:
        result.margins = _curve_margins(test, _curve_over_x(gathered[0], where, seeds), result)
        return
    per_side = [[side.values(where)[seed] for seed in seeds] for side in gathered]
    if test.test == "monotone":
        named = [(side.name, values) for side, values in zip(sides, per_side, strict=True)]
        result.margins = _curve_margins(test, named, result)
    else:
        if test.delta.unit == RELATIVE and any(0 in values for values in per_side[1:]):
            result.problems.append("a reference is 0, so that nothing is relative to it")
            return
        if test.test == "superiority" and len({v for values in per_side for v in values}) == 1:
            result.problems.append(
                f"every model has {per_side[0][0]:g} with every seed: a floor or a ceiling tells "
                "nothing apart"
            )
            return
        result.margins = _comparisons(test, per_side)
        _check_same_fraction(result, test, gathered)


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


def _check_same_fraction(result: Measured, test: Test, gathered: list[Gathered]) -> None:
    """The realised share of tokens in the cache must agree where a test demands it."""
    if test.same_fraction is None:
        return
    arm, *references = gathered
    ours = arm.kv_fraction()
    for side in references:
        theirs = side.kv_fraction()
        if ours is None or theirs is None:
            result.problems.append(f"rows of {arm.name} or {side.name} carry no kv_fraction")
        elif abs(ours - theirs) > test.same_fraction:
            result.problems.append(
                f"realised shares differ: {arm.name} {ours:.3f}, {side.name} {theirs:.3f}; "
                f"allowed {test.same_fraction:g}"
            )


def _check_same_metric(
    result: Measured,
    same: SameMetric,
    arm: Side,
    references: list[Side],
    evidence: Sequence[Observation],
) -> None:
    """Another number, such as bytes of the cache, must agree with that of each reference."""
    what = same.where.quantity
    values: dict[str, float] = {}
    for side in (arm, *references):
        rows = [one.row for one in select(evidence, same.where, side)]
        numbers = [value_of(row, same.where) for row in rows]
        if not numbers or None in numbers:
            why = "failed" if numbers else why_nothing(evidence, same.where, side)
            result.problems.append(f"{what} of {side.name} cannot be compared: {why}")
            return
        values[side.name] = mean(numbers)
    ours = values[arm.name]
    for side in references:
        theirs = values[side.name]
        off = abs(ours - theirs) / abs(theirs) if theirs else float("inf")
        if off > same.tolerance:
            result.problems.append(
                f"{what} differs by {100 * off:.1f} %: {arm.name} {ours:,.0f}, {side.name} "
                f"{theirs:,.0f}; allowed {100 * same.tolerance:g} %"
            )


def _timing(test: Test, found: list[list[Observation]]) -> Measured:
    """Factors by cell: what both sides measured in one run, launched alike and right."""
    arm, theirs = ({_cell(one, test.where): one.row for one in rows} for rows in found)
    result = Measured()
    # A cell that was measured in several runs counts once: the last run given.
    cells: dict[tuple, tuple[str, Estimate, str]] = {}
    for key in (key for key in arm if key in theirs):
        name = _cell_words(key, test.where)
        factor = _factor(arm[key], theirs[key], test.where)
        if isinstance(factor, str):
            result.notes.append(f"{name}: {factor}")
        else:
            cells[key[1:]] = (name, factor, key[0])
    alone = len(arm.keys() - theirs.keys())
    if alone:
        result.notes.append(f"{alone} cells lack {test.reference[0].name}")
    if not cells:
        result.problems.append("no cell has a time of both sides that counts")
    result.cells = [(name, factor) for name, factor, _ in cells.values()]
    result.n, result.runs = len(cells), sorted({run for _, _, run in cells.values()})
    return result


def _cell(one: Observation, where: Where) -> tuple:
    return (one.run, one.row.device, *coordinate(one.row, where))


def _cell_words(key: tuple, where: Where) -> str:
    _, _, task, x, *labels = key
    parts = [str(task)] if task is not None else []
    parts += [f"x {x:g}"] if x is not None else []
    return ", ".join(parts + [f"{name} {value}" for name, value in labels]) or where.experiment


def _factor(ours: Row, theirs: Row, where: Where) -> Estimate | str:
    """How many times less ours is, from the least to the most favourable ends of both ranges.

    Labels, such as bytes, are exact and have no range.
    """
    fault = timing_fault(ours) or timing_fault(theirs)
    if fault:
        return fault
    if where.label is not None:
        mine, other = value_of(ours, where), value_of(theirs, where)
        if mine is None or other is None or mine <= 0:
            return f"no {where.label}"
        return Estimate(other / mine, 1, other / mine, other / mine, "exact")
    if ours.launch_mode != theirs.launch_mode:
        return f"launched differently: {ours.launch_mode}, {theirs.launch_mode}"
    if ours.low is None or theirs.low is None or ours.low <= 0:
        return "no 20th to 80th percentile"
    low, high = theirs.low / ours.high, theirs.high / ours.low
    return Estimate(theirs.value / ours.value, min(ours.n, theirs.n), low, high, "p20_p80")
