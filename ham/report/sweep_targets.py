"""Targets of decoding and training against the rows of a sweep: met, missed or not measured."""

from __future__ import annotations

from dataclasses import dataclass

from ham.report.formats import count, join_words, reason, share, significant
from ham.report.rows import Row
from ham.report.sweep_cells import HAM, TRANSFORMER, Place, Series, SweepRows, number
from ham.report.tables_base import Column, Record, Table

MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"
QUARTER = Series(HAM, 0.25)
DENSE = Series(TRANSFORMER)
RULE = Series("gated-delta-rule")
HEAD_DIMS = (64, 128)
MAIN, LONG, SHORT = (32768, 16), (131072, 8), (1024, 1)
LONGEST_CROSSING = 8192
FEWEST_TOKENS = 64 * 32
"""64 pages of 32 tokens: below, a page that is not full weighs too much."""

NOTE = (
    "Medians of CUDA graph replays with 20th to 80th percentile where a GPU ran them, L2 cache "
    "cleared before each. The other side of a factor is the fastest of torch's attention kernels "
    "for that cell, in its fastest layout."
)


@dataclass(frozen=True)
class Verdict:
    """What was asked and what the rows say.

    Attributes:
        what: In words.
        asked: The limit in words.
        measured: The number in words, or None.
        reached: Whether the limit is kept; None without a number.
        detail: The times behind it, or why there is no number.
    """

    what: str
    asked: str
    measured: str | None
    reached: bool | None
    detail: str

    @property
    def verdict(self) -> str:
        """In a word or two."""
        if self.reached is None:
            return NOT_MEASURED
        return MET if self.reached else MISSED


def judge_all(rows: SweepRows) -> list[Verdict]:
    """Every target."""
    return [
        *(_faster_mixer(rows, head_dim) for head_dim in HEAD_DIMS),
        *(_bandwidth(rows, head_dim) for head_dim in HEAD_DIMS),
        _faster_model(rows, MAIN, 2.5),
        _faster_model(rows, LONG, 2.8),
        _cache_memory(rows),
        _crossing(rows),
        _short_step(rows),
    ]


def targets_table(rows: SweepRows) -> Table:
    """The table of targets."""
    records: list[Record] = [
        {
            "what": one.what,
            "asked": one.asked,
            "measured": one.measured,
            "verdict": one.verdict,
            "detail": one.detail,
        }
        for one in judge_all(rows)
    ]
    columns = [
        Column("what", "what"),
        Column("asked", "asked"),
        Column("measured", "measured"),
        Column("verdict", "verdict"),
        Column("detail", "behind it"),
    ]
    return Table("targets", "Targets", NOTE, columns, records, legend="A dash: no number.")


def _faster_mixer(rows: SweepRows, head_dim: int) -> Verdict:
    place = Place("mixer_decode", *MAIN, head_dim)
    what = f"HAM mixer step against attention over the full cache, {_size(place)}"
    return _factor(rows, what, place, QUARTER, DENSE, 3.0)


def _faster_model(rows: SweepRows, size: tuple[int, int], asked: float) -> Verdict:
    place = Place("model_decode", *size, HEAD_DIMS[0])
    what = f"whole-model tokens/s against the transformer, {_size(place)}"
    return _factor(rows, what, place, QUARTER, DENSE, asked)


def _factor(
    rows: SweepRows, what: str, place: Place, ours: Series, theirs: Series, asked: float
) -> Verdict:
    mine, other = rows.find(place, ours), rows.find(place, theirs)
    fast, slow = number(mine), number(other)
    detail = f"{_time(ours, mine)}; {_time(theirs, other)}"
    if fast is None or slow is None:
        return Verdict(what, f"{asked:g}× faster", None, None, detail)
    factor = slow / fast
    reached = factor >= asked and _same_launch(mine, other)
    return Verdict(what, f"{asked:g}× faster", f"{significant(factor)}×", reached, detail)


def _bandwidth(rows: SweepRows, head_dim: int) -> Verdict:
    place = Place("mixer_decode", *MAIN, head_dim)
    row = rows.find(place, QUARTER)
    percent = number(row, "percent_of_copy_bandwidth")
    what = f"HAM mixer step: bytes that it must move, {_size(place)}"
    asked = "85 % of copy bandwidth"
    if percent is None:
        return Verdict(what, asked, None, None, _time(QUARTER, row))
    return Verdict(what, asked, share(percent / 100), percent >= 85, _time(QUARTER, row))


def _cache_memory(rows: SweepRows) -> Verdict:
    """The largest deviation over all decode cells of HAM that hold enough tokens."""
    what = "allocated cache against routed share × full cache, states on both sides"
    asked = "within 5 % from 64 pages on"
    worst: tuple[float, Place, Series] | None = None
    cells = 0
    for experiment in ("mixer_decode", "model_decode"):
        for place, series, row in rows.cells(experiment):
            held, full = number(row, "kv_bytes"), number(row, "full_cache_bytes")
            routed = row.kv_fraction
            if series.model != HAM or held is None or full is None or routed is None:
                continue
            if routed * place.context < FEWEST_TOKENS:
                continue
            cells += 1
            states = number(row, "state_bytes") or 0.0
            off = (held + states) / (routed * full + states) - 1
            if worst is None or abs(off) > abs(worst[0]):
                worst = (off, place, series)
    if worst is None:
        return Verdict(what, asked, None, None, "no decode cell of HAM with so many tokens")
    off, place, series = worst
    detail = f"largest of {cells} cells: {series.name}, {place.experiment}, {_size(place)}"
    return Verdict(what, asked, f"{100 * off:+.1f} %".replace("-", "−"), abs(off) <= 0.05, detail)


def crossing_context(rows: SweepRows) -> tuple[int | None, list[tuple[int, float]]]:
    """From where on HAM trains faster at every longer context, and the factors.

    Only contexts count at which both were measured and launched alike.
    """
    factors = []
    for place in rows.places("model_train"):
        mine, other = rows.find(place, QUARTER), rows.find(place, DENSE)
        ours, theirs = number(mine), number(other)
        if ours is not None and theirs is not None and _same_launch(mine, other):
            factors.append((place.context, theirs / ours))
    crossing = None
    for context, factor in reversed(factors):
        if factor <= 1:
            break
        crossing = context
    return crossing, factors


def _crossing(rows: SweepRows) -> Verdict:
    what = "training step at 25 % routed faster than the transformer's from some context on"
    asked = f"at most {count(LONGEST_CROSSING)} tokens"
    crossing, factors = crossing_context(rows)
    detail = "; ".join(f"{count(context)}: {significant(factor)}×" for context, factor in factors)
    if not factors:
        return Verdict(what, asked, None, None, "no context with both times")
    longest = factors[-1][0]
    if crossing is None:
        enough = longest >= LONGEST_CROSSING
        measured = f"not up to {count(longest)}"
        return Verdict(what, asked, measured, False if enough else None, detail)
    measured = f"from {count(crossing)} tokens"
    return Verdict(what, asked, measured, crossing <= LONGEST_CROSSING, detail)


def _short_step(rows: SweepRows) -> Verdict:
    place = Place("model_decode", *SHORT, HEAD_DIMS[0])
    mine, other = rows.find(place, QUARTER), rows.find(place, RULE)
    what = f"whole-model step against the gated delta rule's, {_size(place)}"
    asked = "at most 1.5× its time"
    detail = f"{_time(QUARTER, mine)}; {_time(RULE, other)}"
    ours, theirs = number(mine), number(other)
    if ours is None or theirs is None:
        return Verdict(what, asked, None, None, detail)
    factor = ours / theirs
    reached = factor <= 1.5 and _same_launch(mine, other)
    return Verdict(what, asked, f"{significant(factor)}×", reached, detail)


def _same_launch(first: Row | None, second: Row | None) -> bool:
    """Whether both sides were launched alike; a factor between unlike ones proves nothing."""
    return first is not None and second is not None and first.launch_mode == second.launch_mode


def _time(series: Series, row: Row | None) -> str:
    if row is None:
        return f"{series.name}: not run"
    if row.value is None:
        return f"{series.name}: {reason(row.error or '', 90)}"
    spread = ""
    if row.low is not None and row.high is not None:
        ends = [significant(end, like=row.value) for end in (row.low, row.high)]
        spread = f" [{', '.join(ends)}]"
    how = f"{row.provider}, {row.launch_mode.replace('_', ' ')}, n={row.n}"
    return f"{series.name}: {significant(row.value)} ms{spread} ({how})"


def _size(place: Place) -> str:
    return join_words(
        [
            f"{count(place.context)} tokens",
            f"batch {place.batch}",
            f"head size {place.head_dim}",
        ]
    )
