"""The ledger: every claim with its verdict, as text, JSON and a table of the report."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ham.claims.config import RELATIVE, TIMES
from ham.claims.judge import INCONCLUSIVE, VERDICTS, Judged, JudgedClaim
from ham.claims.measure import Kept
from ham.claims.ranges import printed
from ham.report.formats import count, join_words, significant
from ham.report.inference import LARGEST_N
from ham.report.tables_base import Column, Record, Table

NOTE = (
    "Statement, query, test, smallest effect δ and expectation are written before the runs; rows "
    "that are older than their claim are marked. Over seeds: supported where the t interval lies "
    "wholly beyond the bound, refuted where wholly short of it, else inconclusive; intervals are "
    "paired by seed and widened by Holm's correction over the tests of a family, those not run "
    "included. A claim is supported if all of its tests are, refuted if one is; of several "
    "comparisons the one nearest to failing is shown. Timings have repeats and no seeds: supported "
    "where in each of at least three cells the whole range (20th to 80th percentile of both sides) "
    "lies beyond δ, refuted where at least three lie wholly short, mixed where one or two do. n "
    "counts seeds, or cells of timings; below three nothing is decided. Tokens kept: the share "
    "that each side that routes really kept of the rows compared, with its range over the grid; "
    "where a claim asks for equal shares and they differ, only a win of the side that keeps fewer "
    "counts. Intervals of shares are printed as far as they are possible; verdicts rest on them as "
    "computed, and so do the columns low and high of the CSV file."
)
LEGEND = "A dash: no number."
COLUMNS = [
    Column("claim", "claim"),
    Column("test", "test"),
    Column("verdict", "verdict"),
    Column("asked", "asked"),
    Column("effect", "effect", significant),
    Column("interval", "interval"),
    Column("kept", "tokens kept"),
    Column("n", "n", count),
    Column("settles_at", "n that would settle it", count),
    Column("reason", "why, and what to know"),
    Column("statement", "statement"),
    Column("expectation", "expected before the runs"),
    Column("command", "recompute"),
    # For programs, which cannot read `interval`.
    Column("low", "low", significant),
    Column("high", "high", significant),
    Column("level", "level", significant),
    Column("bound", "bound", significant),
    Column("p", "p", significant),
    Column("p_adjusted", "adjusted p", significant),
]
READER_COLUMNS = tuple(column.key for column in COLUMNS[:13])
SHORT_COLUMNS = (
    *("claim", "statement", "test", "verdict"),
    *("effect", "interval", "kept", "n", "reason"),
)


def tally(judged: Sequence[JudgedClaim]) -> str:
    """`1 supported, 1 refuted, 5 inconclusive, 6 not run`."""
    counts = Counter(claim.verdict for claim in judged)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS)


def command(claim: str, places: Sequence[str], claims_file: str | None = None) -> str:
    """The command line that judges one claim again."""
    file = [] if claims_file is None else ["--claims", claims_file]
    return shlex.join(["ham", "claims", *places, *file, "--only", claim])


def asked(one: Judged) -> str:
    """What a test asks for, in words."""
    test = one.test
    size = _size(one)
    names = join_words([side.name for side in test.reference])
    quantity = test.where.quantity
    if test.test == "monotone":
        step = f"no step of {quantity} worse by {size}"
        if test.largest_step is None:
            return step
        return f"{step}, none with more than {100 * test.largest_step:g} % of the gain"
    return {
        "superiority": f"{quantity} better than {names} by more than {size}",
        "non_inferiority": f"{quantity} worse than {names} by less than {size}",
        "threshold": f"{quantity} better than {size}",
        "timing": f"{quantity} of {names} more than {size} that of {test.arms[0].name}",
    }[test.test]


def _size(one: Judged) -> str:
    delta = one.test.delta
    if delta.unit == RELATIVE:
        return f"{100 * delta.value:g} %"
    if delta.unit == TIMES:
        return f"{delta.value:g} times"
    return f"{delta.value:g}" if delta.unit == "share" else f"{delta.value:g} {delta.unit}"


def interval_words(one: Judged) -> str | None:
    """`[0.01, 0.03] (98.3 % t; bound 0.005)`; None where one seed or cell gives none."""
    effect = one.effect
    if effect is None or effect.low is None or effect.high is None:
        return None
    seen = printed(one.test, effect.low, effect.high)
    ends = ", ".join(_number(one, end) for end in (seen.low, seen.high))
    kind = f"{100 * (1 - one.level):.4g} % t" if effect.interval != "p20_p80" else "p20 to p80"
    kind = "exact" if effect.interval == "exact" else kind
    clipped = ", clipped to what is possible" if seen.clipped else ""
    nothing = "" if seen.informative else ": no information"
    return f"[{ends}] ({kind}{clipped}; bound {_number(one, one.bound or 0.0)}){nothing}"


def _number(one: Judged, value: float) -> str:
    scale, end = (100, " %") if one.test.delta.unit == RELATIVE else (1, "")
    return f"{scale * value:.3g}{'×' if one.test.delta.unit == TIMES else end}"


def kept_words(one: Judged) -> str:
    """`ham-cosine 18.0 % (12.6 to 25.4), ham-random 24.4 %`; empty where no side routes."""
    return ", ".join(f"{kept.side} {_share(kept)}" for kept in one.kept)


def _share(kept: Kept) -> str:
    low, middle, high = (f"{100 * share:.1f}" for share in (kept.low, kept.mean, kept.high))
    return f"{middle} %" if low == high else f"{middle} % ({low} to {high})"


def ledger_table(
    judged: Sequence[JudgedClaim], places: Sequence[str], claims_file: str | None = None
) -> Table:
    """One line a test; the claim's own verdict stands beside its id where there are several."""
    records: list[Record] = []
    for claim in judged:
        several = len(claim.tests) > 1
        for one in claim.tests:
            records.append(
                {
                    "claim": f"{one.claim}: {claim.verdict}" if several else one.claim,
                    "test": one.test.name,
                    "verdict": one.verdict,
                    "asked": asked(one),
                    "effect": None if one.effect is None else one.effect.value,
                    "interval": interval_words(one),
                    "kept": kept_words(one) or None,
                    "n": one.n,
                    "settles_at": one.settles_at,
                    "reason": _why(one) or None,
                    "statement": claim.claim.statement,
                    "expectation": claim.claim.expectation,
                    "command": command(one.claim, places, claims_file),
                    "low": None if one.effect is None else one.effect.low,
                    "high": None if one.effect is None else one.effect.high,
                    "level": one.level if one.effect is not None else None,
                    "bound": one.bound,
                    "p": one.p,
                    "p_adjusted": one.p_adjusted,
                }
            )
    return Table(
        "claims", "Claims", f"{tally(judged)}. {NOTE}", COLUMNS, records, SHORT_COLUMNS, LEGEND
    )


def _why(one: Judged) -> str:
    parts = [one.decisive] if one.decisive else []
    return "; ".join([*parts, *([one.reason] if one.reason else [])])


def as_text(
    judged: Sequence[JudgedClaim], places: Sequence[str], claims_file: str | None = None
) -> str:
    """The ledger for a terminal."""
    lines = []
    for claim in judged:
        lines.append(f"{claim.claim.id}  {claim.verdict.upper()}  {claim.claim.statement}")
        for one in claim.tests:
            lines.append(f"    {one.test.name}: {one.verdict}; asked: {asked(one)}")
            if one.effect is not None:
                found = interval_words(one) or "no interval"
                effect = _number(one, one.effect.value)
                lines.append(f"        effect {effect} {found}, n={one.n}; {one.decisive}")
            if one.kept:
                lines.append(f"        tokens kept: {kept_words(one)}")
            if one.verdict == INCONCLUSIVE and one.effect is not None and not one.blocked:
                lines += [f"        {words}" for words in _settling(one)]
            if one.reason:
                lines.append(f"        {one.reason}")
        lines.append(f"    recompute: {command(claim.claim.id, places, claims_file)}")
    return "\n".join([*lines, "", tally(judged)])


def _settling(one: Judged) -> list[str]:
    if one.holds_from is not None:
        # Each cell has its answer; the reason says where it holds.
        return []
    if one.test.test == "timing":
        return ["more cells, or cells with less noise, would have to be measured"]
    if one.settles_at is not None:
        return [f"would be settled at n={one.settles_at} if mean and spread stayed the same"]
    if one.n < 2:
        return ["with one seed there is no spread from which to tell the n that would settle it"]
    return [f"no n up to {LARGEST_N:,} is known that would settle it"]


def as_records(
    judged: Sequence[JudgedClaim], places: Sequence[str], claims_file: str | None = None
) -> dict[str, Any]:
    """The ledger as JSON values."""
    return {
        "tally": dict(Counter(claim.verdict for claim in judged)),
        "claims": [
            {
                **claim.claim.model_dump(mode="json", exclude={"tests"}),
                "verdict": claim.verdict,
                "command": command(claim.claim.id, places, claims_file),
                "tests": [_test_record(one) for one in claim.tests],
            }
            for claim in judged
        ],
    }


def _test_record(one: Judged) -> dict[str, Any]:
    effect = one.effect
    return {
        "name": one.test.name,
        "test": one.test.test,
        "family": one.test.family,
        "asked": asked(one),
        "delta": one.test.delta.model_dump(mode="json"),
        "verdict": one.verdict,
        "n": one.n,
        "effect": None if effect is None else effect.value,
        "low": None if effect is None else effect.low,
        "high": None if effect is None else effect.high,
        "interval": interval_words(one),
        "level": one.level,
        "bound": one.bound,
        "decisive": one.decisive,
        "p": one.p,
        "p_adjusted": one.p_adjusted,
        "settles_at": one.settles_at,
        "holds_from": one.holds_from,
        "kv_fraction": {kept.side: kept.mean for kept in one.kept},
        "reason": one.reason,
        "runs": list(one.runs),
    }
