"""Targets of the kernels against rows: met, missed or not measured, with the numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ham.kernels.speed.targets import OURS, TARGETS, Target
from ham.report.formats import reason, significant
from ham.report.kernel_cells import EAGER, GRAPH, MODE_WORDS, Place, SpeedRows, is_right
from ham.report.rows import Row
from ham.report.tables_base import Column, Record, Table

NOT_MEASURED = "not measured"
MET, MISSED = "met", "missed"
NOTE = (
    "A factor says how many times faster than the peer, medians of eager calls with cold L2 cache "
    "in one run; the last column has the same factor for replays of CUDA graphs. Limits without a "
    "peer are milliseconds. A time whose result was wrong or not compared counts as not measured."
)


@dataclass(frozen=True)
class Verdict:
    """A target and what the rows say about it.

    Attributes:
        ours_ms, peer_ms: The two medians, as far as they count.
        factor: Times faster than the peer, or our milliseconds where there is no peer.
        missing: Why a number is missing, or None.
    """

    target: Target
    ours_ms: float | None = None
    peer_ms: float | None = None
    factor: float | None = None
    missing: str | None = None

    def reaches(self, asked: float | None) -> str | None:
        """`met`, `missed` or `not measured`; None where nothing is asked."""
        if asked is None:
            return None
        if self.factor is None:
            return NOT_MEASURED
        good = self.factor <= asked if self.target.peer is None else self.factor >= asked
        return MET if good else MISSED


def judge(target: Target, rows: SpeedRows, launch_mode: str = EAGER) -> Verdict:
    """Look the numbers of a target up."""
    if not target.measured_here:
        return Verdict(target, missing="not part of `ham kernels bench`")
    ours, ours_missing = _time(rows, target, OURS, target.fraction, launch_mode)
    if target.peer is None:
        return Verdict(target, ours, None, ours, ours_missing)
    fraction = target.fraction if target.peer_fraction is None else target.peer_fraction
    peer, peer_missing = _time(rows, target, target.peer, fraction, launch_mode)
    missing = "; ".join(filter(None, (ours_missing, peer_missing))) or None
    if ours is None or peer is None:
        return Verdict(target, ours, peer, None, missing)
    return Verdict(target, ours, peer, peer / ours)


def _time(
    rows: SpeedRows, target: Target, provider: str, fraction: float | None, launch_mode: str
) -> tuple[float | None, str | None]:
    place = Place(target.operation, target.shape, -1.0 if fraction is None else fraction)
    row = rows.find(place, provider, f"{target.mode}_ms", launch_mode)
    if row is None:
        return None, f"{provider}: not run"
    if row.value is None:
        return None, f"{provider}: {reason(row.error or '', 90)}"
    if not is_right(row):
        return None, f"{provider}: {_fault(row)}"
    return row.value, None


def _fault(row: Row) -> str:
    fault = row.labels.get("comparison_error")
    return "result not compared" if fault is None else f"wrong result: {reason(str(fault), 60)}"


def judge_all(rows: SpeedRows, targets: Sequence[Target] = TARGETS) -> list[Verdict]:
    """All targets by eager times."""
    return [judge(target, rows) for target in targets]


COLUMNS = [
    Column("what", "what"),
    Column("shape", "shape"),
    Column("mode", "mode"),
    Column("ours_ms", "ours, ms", significant),
    Column("peer", "peer"),
    Column("peer_ms", "peer, ms", significant),
    Column("factor", "factor or ms", significant),
    Column("must", "must", significant),
    Column("must_verdict", "must: verdict"),
    Column("stretch", "stretch", significant),
    Column("stretch_verdict", "stretch: verdict"),
    Column("missing", "why not measured"),
    Column("graph_factor", "factor or ms, CUDA graph", significant),
]


def targets_table(rows: SpeedRows, targets: Sequence[Target] = TARGETS) -> Table:
    """The table of targets."""
    return Table(
        "targets",
        "Targets of the kernels",
        NOTE,
        COLUMNS,
        [
            _record(verdict, judge(verdict.target, rows, GRAPH))
            for verdict in judge_all(rows, targets)
        ],
        legend="A dash: nothing is asked, or there is no number.",
    )


def _record(verdict: Verdict, graph: Verdict) -> Record:
    target = verdict.target
    return {
        "what": target.what,
        "shape": target.shape,
        "mode": MODE_WORDS.get(target.mode, target.mode),
        "ours_ms": verdict.ours_ms,
        "peer": target.peer,
        "peer_ms": verdict.peer_ms,
        "factor": verdict.factor,
        "must": target.must,
        "must_verdict": verdict.reaches(target.must),
        "stretch": target.stretch,
        "stretch_verdict": verdict.reaches(target.stretch),
        "missing": verdict.missing,
        "graph_factor": graph.factor,
    }
