"""The report of a sweep from invented rows: targets, tables, figures, published folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ham.errors import MissingDataError
from ham.files import read_json
from ham.measure.sweep.budget import cache_bytes, full_cache_bytes
from ham.measure.sweep.grid import CLUSTERED, DECODE_PART, FULL, Cell, Choice, choose_cells
from ham.measure.sweep.models import arm_name
from ham.measure.sweep.store import CEILING_EXPERIMENT, PART_TIME, TIME
from ham.report.manifest import collect_manifest, manifest_path, write_manifest
from ham.report.plots_base import save_svg, style_context
from ham.report.publish import RESULTS, build_published, published_names
from ham.report.rows import Row, write_rows
from ham.report.sweep_cells import SweepRows
from ham.report.sweep_parts import parts_figure
from ham.report.sweep_report import SUMMARY, build_sweep_report
from ham.report.sweep_tables import sweep_tables
from ham.report.sweep_targets import crossing_context, judge_all, targets_table
from ham.report.table_format import to_csv

DEVICE = "synthetic device (invented numbers)"
COPY_RATE = 3e12
STEP_MS = {"mixer_decode": 0.01, "model_decode": 0.2, DECODE_PART: 0.2, "model_prefill": 1.0}
Speed = Callable[[Cell], float]


def invented_ms(cell: Cell) -> float:
    """Reading the cache at the copy rate, and a constant; training by its attention."""
    if cell.experiment == "model_train":
        share = {"ham": cell.fraction, "transformer": 1.0}.get(cell.model, 0.0)
        return 40 + (18 if cell.model == "ham" else 0) + 0.01 * (share or 0.0) * cell.context
    return STEP_MS[cell.experiment] + cache_bytes(cell, FULL, 2) / COPY_RATE * 1e3


def invented_row(cell: Cell, ms: float | None, **changes: object) -> Row:
    routed = {} if cell.fraction is None else {"fraction": cell.fraction, "routing": cell.routing}
    found = {}
    if ms is not None:
        found = {
            "tokens_per_s": cell.batch / ms * 1e3,
            "kv_bytes": round((cell.fraction or 1.0) * full_cache_bytes(cell, FULL, 2)),
            "full_cache_bytes": full_cache_bytes(cell, FULL, 2),
            "state_bytes": 1 << 20,
            "peak_bytes": cache_bytes(cell, FULL, 2) + (1 << 29),
            "percent_of_copy_bandwidth": 90.0,
        }
    fields = {
        "experiment": cell.experiment,
        "model": arm_name(cell.model),
        "mixer": cell.model,
        "metric": TIME,
        "value": ms,
        "x_name": "context",
        "x_value": cell.context,
        "labels": {"batch": cell.batch, "head_dim": cell.head_dim, **routed, **found},
        "kv_fraction": 1.0 if cell.model == "transformer" else cell.fraction,
        "launch_mode": "cuda_graph",
        "device": DEVICE,
        "manifest_id": "synthetic000",
        **({} if ms is None else {"n": 9, "low": 0.98 * ms, "high": 1.03 * ms}),
        **({"error": "out of memory: needs 96.0 GiB, 70.0 GiB free"} if ms is None else {}),
        **({} if ms is None else {"interval": "p20_p80"}),
    }
    return Row(**{**fields, **changes})


def invented_rows(speed: Speed = invented_ms) -> list[Row]:
    """Every cell of the full sweep; what does not fit into 75 GB has failed."""
    rows = [
        Row(
            experiment=CEILING_EXPERIMENT,
            model="device",
            mixer="device",
            metric=metric,
            value=value,
            device=DEVICE,
            manifest_id="synthetic000",
        )
        for metric, value in (("copy_gb_per_second", 3000.0), ("read_gb_per_second", 3100.0))
    ]
    for cell in choose_cells(FULL, Choice())[1]:
        fits = cache_bytes(cell, FULL, 2) < 75e9
        ms = speed(cell) if fits else None
        rows.append(invented_row(cell, ms))
        if cell.experiment == DECODE_PART and ms is not None:
            rows += [
                invented_row(cell, part * ms, metric=PART_TIME, task=name)
                for name, part in (("attention", 0.6), ("projections", 0.2), ("mlp", 0.1))
            ]
    return rows


def verdicts(rows: list[Row]) -> list[str]:
    return [one.verdict for one in judge_all(SweepRows(rows))]


def test_targets_are_judged_by_the_numbers_of_their_cells() -> None:
    """At copy speed HAM reads a quarter: every factor but the constant parts allow is there."""
    found = judge_all(SweepRows(invented_rows()))
    assert [one.verdict for one in found] == ["met"] * 9
    # 2 KiB a token and head size 64: 32,769 tokens of 16 sequences are 2.15 GB, 0.716 ms; a
    # quarter with the longest of the sequences a little above the mean, and 0.01 ms each.
    assert found[0].measured == "3.65×"
    assert found[2].measured == "90.0 %"
    assert found[7].measured == "from 4,096 tokens"
    assert "cuda graph, n=9" in found[0].detail


def test_a_slower_step_misses_its_target() -> None:
    slow = [
        *verdicts(
            invented_rows(lambda cell: invented_ms(cell) * (1.5 if cell.model == "ham" else 1))
        )
    ]
    assert slow[:2] == ["missed", "missed"]
    assert slow[4:6] == ["missed", "missed"]


def test_a_factor_between_unlike_launches_proves_nothing() -> None:
    rows = [
        row.model_copy(update={"launch_mode": "eager"}) if row.model == "transformer" else row
        for row in invented_rows()
    ]
    assert verdicts(rows)[0] == "missed"


def test_what_was_not_run_or_failed_is_not_measured() -> None:
    assert set(verdicts([])) == {"not measured"}
    failed = [
        row.model_copy(update={"value": None, "error": "lost", "low": None, "high": None})
        for row in invented_rows()
    ]
    found = judge_all(SweepRows(failed))
    assert {one.verdict for one in found} == {"not measured"}
    assert "ham 25 %: lost" in found[0].detail


def test_a_cache_that_is_too_large_misses() -> None:
    rows = invented_rows()
    for row in rows:
        if row.model == "ham" and "kv_bytes" in row.labels:
            row.labels["kv_bytes"] *= 1.06
    assert verdicts(rows)[6] == "missed"


def test_the_crossing_needs_every_longer_context() -> None:
    def speed(cell: Cell) -> float:
        ahead = {1024: 0.9, 2048: 1.1, 4096: 0.9}.get(cell.context, 0.8)
        return 100 * (ahead if cell.model == "ham" else 1.0)

    rows = SweepRows(invented_rows(speed))
    assert crossing_context(rows)[0] == 4096


def test_the_report_is_complete(tmp_path: Path) -> None:
    rows = invented_rows()
    listing = build_sweep_report(rows, tmp_path / "a")
    assert listing["failed_rows"] == sum(row.value is None for row in rows) > 0
    names = {Path(file).name for file in listing["files"]}
    assert {"decode.png", "memory.svg", "ratio.png", "train.png", "parts.png"} <= names
    assert {"targets.md", "model_decode.csv", "mixer_decode.tex", "model_prefill.md"} <= names
    summary = (tmp_path / "a" / SUMMARY).read_text()
    assert DEVICE in summary and "failed: out of memory: needs 96.0 GiB" in summary
    assert "ham 25 %, clustered" in summary


def test_equal_rows_give_equal_bytes_in_any_order() -> None:
    rows = invented_rows()
    found = [SweepRows(rows), SweepRows(reversed(rows))]
    first, second = ([to_csv(table) for table in sweep_tables(one)] for one in found)
    assert first == second
    assert targets_table(found[0]) == targets_table(found[1])
    with style_context():
        left, right = (save_svg(parts_figure(one).figure) for one in found)
    assert left == right


def test_rows_of_other_stages_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="ham sweep run"):
        build_sweep_report([], tmp_path)


def test_a_published_sweep_gets_its_page(tmp_path: Path) -> None:
    folder = tmp_path / RESULTS / "2026-01-01-gpu"
    cells = choose_cells(FULL, Choice(quick=True))[1]
    rows = folder / "sweep.rows.jsonl"
    write_rows(rows, [invented_row(cell, invented_ms(cell)) for cell in cells])
    write_manifest(manifest_path(rows), collect_manifest({}, ["ham", "sweep", "run"]))
    assert published_names(tmp_path) == ["2026-01-01-gpu"]
    (page,) = build_published("2026-01-01-gpu", tmp_path)
    assert page.name == SUMMARY and page.is_file()
    assert read_json(page.with_name("sweep.json"))["rows"] == len(cells)


def test_clustered_cells_are_apart_from_the_others() -> None:
    rows = SweepRows(invented_rows())
    routings = {place.routing for place in rows.places("mixer_decode")}
    assert CLUSTERED in routings and len(routings) == 2


def test_the_table_says_which_parts_are_more_than_their_name_or_not_like_the_step() -> None:
    (cell,) = choose_cells(FULL, Choice([DECODE_PART], ["ham"], [32768], [16], [0.25], True))[1]
    whole = invented_row(cell, 1.0)
    routed = whole.labels
    parts = [
        invented_row(
            cell, 0.2, metric=PART_TIME, task="recurrent", labels={**routed, "fused": "A"}
        ),
        invented_row(
            cell,
            None,
            metric=PART_TIME,
            task="norms",
            error="LoweringError: no kernel",
            labels={**routed, "operations": "inductor"},
        ),
    ]
    (table,) = sweep_tables(SweepRows([whole, *parts]))
    assert "ham, recurrent: A." in table.note
    assert "ham, norms: inductor, cuda_graph; LoweringError: no kernel." in table.note
    (plain,) = sweep_tables(SweepRows([whole]))
    assert plain.note.endswith("share what they read.")


def test_the_table_of_prefill_says_how_it_was_launched() -> None:
    """Rows of before are in published tables, whose words stay."""
    cell = Cell("model_prefill", "ham", 1024, 1, 0.25, 64)
    notes = [
        sweep_tables(SweepRows([invented_row(cell, 1.0, launch_mode=mode)]))[0].note
        for mode in ("eager", "cuda_graph")
    ]
    assert "the first token; launched eagerly for all. Larger" in notes[0]
    assert "the first token; one CUDA graph, and behind it" in notes[1]
