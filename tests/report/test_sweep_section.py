"""Figures of sweeps on the page of a run: which rows they draw, and where they stand."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from ham.claims.evidence import Evidence, Observation
from ham.report.build import build_report
from ham.report.html import PageFigure
from ham.report.rows import Row
from ham.report.sweep_section import after_cost, newest_cells, sweep_page_figures

OLD, NEW = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)


def row(model: str, context: int, ms: float | None = 1.0, experiment="model_decode", **more) -> Row:
    routed = {"fraction": 0.25, "routing": "forced"} if model == "ham" else {}
    counted = {"tokens_per_s": 8e3, "kv_bytes": 64 * context, "state_bytes": 512}
    fields = {
        "mixer": model,
        "parameters": 184_000_000,
        "metric": "median_ms",
        "x_name": "context",
        "x_value": context,
        "labels": {"batch": 16, "head_dim": 64, **routed, **counted},
        "launch_mode": "cuda_graph",
        "device": "imaginary GPU",
        "error": "out of memory" if ms is None else None,
    }
    return Row(experiment=experiment, model=model, value=ms, **{**fields, **more})


def evidence(*dated: tuple[datetime, Row]) -> Evidence:
    return Evidence(tuple(Observation(one, f"run-{day}", started=day) for day, one in dated))


def test_the_newest_sweep_gives_a_cell_and_an_older_one_what_it_lacks():
    found = newest_cells(
        evidence(
            (NEW, row("ham", 1024, 2.0)),
            (OLD, row("ham", 1024, 9.0)),
            (OLD, row("ham", 4096, 5.0)),
            (NEW, row("transformer", 1024, 3.0)),
            (NEW, row("mamba2", 1024)),
            (NEW, row("ham", 1024, experiment="model_prefill")),
        )
    )
    assert sorted((one.model, one.x_value, one.value) for one in found) == [
        ("ham", 1024, 2.0),
        ("ham", 4096, 5.0),
        ("transformer", 1024, 3.0),
    ]


def test_a_factor_is_of_one_run_only():
    rows = [(NEW, row(model, 1024, manifest_id="new")) for model in ("ham", "transformer")]
    rows += [(NEW, row("ham", 4096, 2.0, manifest_id="new"))]
    rows += [(OLD, row("transformer", 4096, 4.0, manifest_id="old"))]
    figures = {figure.name: figure for figure, _ in sweep_page_figures(evidence(*rows))}
    assert (
        "at 1,024" in figures["context_ratio"].alt and "4,096" not in figures["context_ratio"].alt
    )
    assert "4,096" in figures["context_decode"].alt


def test_captions_name_size_device_launch_mode_and_what_was_not_measured():
    rows = [(NEW, row(model, 1024)) for model in ("ham", "transformer", "gated-delta-rule")]
    rows += [
        (NEW, row(model, 1024, experiment="model_train", launch_mode="eager"))
        for model in ("ham", "transformer")
    ]
    figures = {figure.name: figure for figure, _ in sweep_page_figures(evidence(*rows))}
    where = "Untrained models of 184 M parameters, not those of this run, on imaginary GPU"
    for name in ("context_decode", "context_memory"):
        assert figures[name].shown.endswith(f"{where} (cuda graph).")
    assert figures["context_train"].shown.endswith(
        f"{where} (eager). Not measured: gated-delta-rule."
    )
    assert list(sweep_page_figures(Evidence())) == []


def test_they_stand_behind_the_figures_of_cost():
    def named(*names: str) -> list[PageFigure]:
        return [PageFigure(name, "", "", "", "", "") for name in names]

    page = after_cost(named("needle", "throughput", "kv_growth", "training_loss"), named("added"))
    assert [one.name for one in page][2:4] == ["kv_growth", "added"]
    assert [one.name for one in after_cost(named("needle"), named("added"))] == ["needle", "added"]


def test_a_page_without_evidence_loses_the_figures_of_an_earlier_one(make_rows, tmp_path: Path):
    rows = [one for one in make_rows(models=["transformer"]) if one.experiment == "recall"]
    beside = evidence((NEW, row("ham", 1024)), (NEW, row("transformer", 1024)))
    listing = build_report(rows, tmp_path, evidence=beside)
    assert "figures/context_decode.png" in listing["files"]
    assert 'id="context_decode' in (tmp_path / "index.html").read_text()
    build_report(rows, tmp_path)
    assert not list((tmp_path / "figures").glob("context_*"))
