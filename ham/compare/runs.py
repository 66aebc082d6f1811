"""The whole comparison of two runs, and its form for programs."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from ham.compare.cells import Key, Pair, match
from ham.compare.judge import COUNTED, Difference, judge
from ham.compare.manifests import Fact, manifest_differences
from ham.compare.sides import Side
from ham.errors import ConfigError
from ham.report.aggregate import Cell
from ham.report.rows import Row


@dataclass(frozen=True)
class Failure:
    """A key of which seeds failed; `pair` holds the rows."""

    pair: Pair

    @property
    def errors(self) -> tuple[list[str], list[str]]:
        """The reasons on each side."""
        return tuple(
            [row.error for row in rows if row.error is not None]
            for rows in (self.pair.one, self.pair.other)
        )

    @property
    def differs(self) -> bool:
        """Whether other seeds failed on one side than on the other."""
        one, other = (
            {row.seed for row in rows if row.error is not None}
            for rows in (self.pair.one, self.pair.other)
        )
        return one != other


@dataclass(frozen=True)
class Comparison:
    """Everything that was found between two runs.

    Attributes:
        one, other: The runs.
        threshold: Relative change that matters.
        facts: What differs in the manifests of what both measured.
        differences: Every key that has a value on both sides, the largest change first.
        failures: Keys that both have, with seeds that failed on either side.
        only_one, only_other: Keys that the other side lacks.
        repeated: Rows of each side that repeat the key and seed of a later one.
    """

    one: Side
    other: Side
    threshold: float
    facts: list[Fact]
    differences: list[Difference]
    failures: list[Failure]
    only_one: list[Pair]
    only_other: list[Pair]
    repeated: tuple[int, int]

    @property
    def counts(self) -> Counter[str]:
        """How many keys came to each verdict."""
        return Counter(difference.verdict for difference in self.differences)

    def differs(self, ignore_missing: bool = False, strict: bool = False) -> bool:
        """Whether anything differs beyond noise and threshold, fails or is missing on one side.

        Args:
            ignore_missing: Leave out keys that only one side has.
            strict: Count times and rates without a spread, whose noise is not known.
        """
        verdicts = (*COUNTED, "unjudged") if strict else COUNTED
        return (
            any(difference.verdict in verdicts for difference in self.differences)
            or any(failure.differs for failure in self.failures)
            or (not ignore_missing and bool(self.only_one or self.only_other))
        )


def compare(one: Side, other: Side, threshold: float) -> Comparison:
    """Compare two runs.

    Args:
        one, other: The runs; changes are those from `one` to `other`.
        threshold: Relative change that matters, e.g. 0.02.

    Raises:
        ConfigError: If the threshold is negative or no key occurs on both sides.
    """
    if not 0 <= threshold < math.inf:
        raise ConfigError(f"the threshold must be at least 0, received {threshold:g}")
    pairs, repeated = match(one.rows, other.rows)
    both = [pair for pair in pairs if pair.one and pair.other]
    if not both:
        words = " and ".join(f"{side.path} has {_example(side)}" for side in (one, other))
        raise ConfigError(f"no row of one run measures what a row of the other does: {words}")
    found = [difference for pair in both if (difference := judge(pair, threshold)) is not None]
    failed = [Failure(p) for p in both if any(r.error is not None for r in (*p.one, *p.other))]
    return Comparison(
        one,
        other,
        threshold,
        manifest_differences(
            one.with_rows(row for pair in both for row in pair.one),
            other.with_rows(row for pair in both for row in pair.other),
        ),
        sorted(found, key=lambda difference: -abs(difference.relative)),
        failed,
        [pair for pair in pairs if not pair.other],
        [pair for pair in pairs if not pair.one],
        repeated,
    )


def to_json(found: Comparison, **facts: Any) -> dict[str, Any]:
    """Everything as JSON values; `facts` are added. Infinite changes become null."""
    return {
        **facts,
        "a": str(found.one.path),
        "b": str(found.other.path),
        "rows": [len(found.one.rows), len(found.other.rows)],
        "repeated_rows": list(found.repeated),
        "threshold": found.threshold,
        "manifests": [
            {"name": fact.name, "a": list(fact.one), "b": list(fact.other)} for fact in found.facts
        ],
        "manifests_missing": [found.one.unexplained, found.other.unexplained],
        "counts": dict(sorted(found.counts.items())),
        "differences": [_difference_json(difference) for difference in found.differences],
        "failed": [
            {**_key_json(failure.pair.key), "a": failure.errors[0], "b": failure.errors[1]}
            for failure in found.failures
        ],
        "only_in_a": [_key_json(pair.key) for pair in found.only_one],
        "only_in_b": [_key_json(pair.key) for pair in found.only_other],
    }


def _difference_json(found: Difference) -> dict[str, Any]:
    return {
        **_key_json(found.pair.key),
        "a": _cell_json(found.one),
        "b": _cell_json(found.other),
        "change": found.change,
        "relative": found.relative if math.isfinite(found.relative) else None,
        "verdict": found.verdict,
        "noise": found.noise._asdict(),
        "notes": list(found.notes),
    }


def _cell_json(cell: Cell) -> dict[str, Any]:
    return {**asdict(cell.estimate), "observations": cell.observations}


def _key_json(key: Key) -> dict[str, Any]:
    return {**key._asdict(), "labels": dict(key.labels)}


def _example(side: Side) -> str:
    experiments = sorted({row.experiment for row in side.rows})
    return f"{', '.join(experiments)} (e.g. {_words(side.rows[0])})"


def _words(row: Row) -> str:
    where = "" if row.x_name is None else f", {row.x_name} {row.x_value:g}"
    return f"{row.model}, {row.metric}{where}"
