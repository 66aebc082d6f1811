"""The kernel report from rows that are made up here and stand for no measurement."""

from __future__ import annotations

from pathlib import Path

import pytest

from ham.cli import build_parser
from ham.kernels.speed.targets import TARGETS, Target
from ham.report.kernel_accuracy import METRIC, accuracy_table
from ham.report.kernel_cells import EAGER, GRAPH, Place, SpeedRows
from ham.report.kernel_plots import operation_figure
from ham.report.kernel_report import build_kernel_report
from ham.report.kernel_tables import speed_tables
from ham.report.kernel_targets import MET, MISSED, NOT_MEASURED, judge, targets_table
from ham.report.manifest import collect_manifest, manifest_path, write_manifest
from ham.report.publish import KERNEL_ROWS, REPORTS, RESULTS, build_published, published_names
from ham.report.rows import Row, read_rows, write_rows

SHAPE = "B8_T4096_H16_D128"
DEVICE = "Made-up GPU"
MANIFEST = {
    "manifest_id": "made-up",
    "commit": "0000000",
    "versions": {"torch": "2.11", "triton": "3.6"},
    "extra": {"peers": {"ssd/fla": "0.6.0"}},
    "measured": {"commands": [["ham", "kernels", "bench"]]},
}


def make_row(
    provider: str,
    ms: float | None,
    *,
    operation: str = "gated_delta_rule",
    shape: str = SHAPE,
    mode: str = "forward",
    launch_mode: str = EAGER,
    fraction: float | None = None,
    correct: bool | None = True,
    error: str | None = None,
    **labels: str | float,
) -> Row:
    said: dict[str, str | float] = {"mode": mode, "floor_ms": 0.2, "floor_bound": "bytes"}
    said |= {"max_relative_error": 3e-3, "worst_tensor": "d k", **labels}
    if fraction is not None:
        said["fraction"] = fraction
    spread = {} if ms is None else {"low": ms * 0.9, "high": ms * 1.1, "interval": "p20_p80"}
    return Row(
        experiment="kernel_speed",
        model=operation,
        mixer=operation,
        metric=f"{mode}_ms",
        value=ms,
        task=shape,
        labels=said,
        kv_fraction=fraction,
        provider=provider,
        launch_mode=launch_mode,
        device=DEVICE,
        n=1 if ms is None else 40,
        correct=correct,
        error=error,
        manifest_id="made-up",
        **spread,
    )


def make_rate(metric: str, value: float) -> Row:
    return Row(
        experiment="kernel_speed",
        model="device",
        mixer="device",
        metric=metric,
        value=value,
        device=DEVICE,
        manifest_id="made-up",
    )


def make_rows() -> list[Row]:
    """Two operations, forward and backward; one wrong peer, one refused backward."""
    rows = [
        make_rate("copy_gb_per_second", 3000.0),
        make_rate("read_gb_per_second", 3100.0),
        make_rate("matmul_tflop_per_second", 700.0),
        make_row("triton", 0.4, score="cosine"),
        make_row("triton", 0.38, launch_mode=GRAPH, score="cosine"),
        make_row("flash_qla", 0.36, score="none"),
        make_row("fla", 1.0, score="none"),
        make_row("torch", 30.0, score="cosine"),
        make_row("triton", 1.5, mode="forward_backward"),
        make_row("flash_qla", 1.3, mode="forward_backward", correct=False, comparison_error="dk"),
        make_row("fla", None, mode="forward_backward", correct=None, error="backward refused: x"),
    ]
    for fraction, ours in ((0.25, 0.4), (0.5, 0.7)):
        rows += [
            make_row("triton", ours, operation="routed_attention", fraction=fraction),
            make_row("flex_prepacked", 0.5, operation="routed_attention", fraction=fraction),
        ]
    rows.append(make_row("sdpa_cudnn", 1.2, operation="routed_attention", fraction=1.0))
    return rows


def find_target(peer: str, mode: str, operation: str = "gated_delta_rule") -> Target:
    return next(
        one
        for one in TARGETS
        if (one.operation, one.peer, one.mode, one.shape) == (operation, peer, mode, SHAPE)
    )


def test_places_come_in_the_order_of_tables() -> None:
    rows = SpeedRows(make_rows())
    assert rows.operations() == ["gated_delta_rule", "routed_attention"]
    routed = [place for place in rows.places if place.operation == "routed_attention"]
    assert [place.routed for place in routed] == [0.25, 0.5, 1.0]
    assert rows.providers(Place("gated_delta_rule", SHAPE)) == [
        "triton",
        "torch",
        "flash_qla",
        "fla",
    ]


def test_numbers_of_a_table() -> None:
    table = speed_tables(make_rows(), numbers=True)[0]
    records = {(record["provider"], record["mode"]): record for record in table.records}
    ours, fla = records["triton", "forward"], records["fla", "forward"]
    assert (ours["eager_ms"], ours["graph_ms"], ours["times_faster"]) == (0.4, 0.38, None)
    # The share of the floor is that of the graph.
    assert ours["of_floor"] == pytest.approx(0.2 / 0.38)
    assert (fla["times_faster"], fla["of_floor"]) == (2.5, 0.2)
    assert fla["graph_times_faster"] is None
    wrong = records["flash_qla", "forward + backward"]
    assert (wrong["eager_ms"], wrong["times_faster"], wrong["correct"]) == (1.3, None, "false")
    assert records["fla", "forward + backward"]["eager_error"] == "backward refused: x"


def test_words_of_a_table() -> None:
    table = speed_tables(make_rows())[0]
    records = {(record["provider"], record["mode"]): record for record in table.records}
    assert records["triton", "forward"]["eager"] == "0.400 [0.360, 0.440]"
    assert records["triton", "forward"]["note"] == "right; with the cosine score"
    assert records["triton", "forward"]["error"] == "3.0e-03 (d k)"
    assert records["flash_qla", "forward + backward"]["note"].startswith("WRONG")
    assert records["fla", "forward + backward"]["eager"] == "failed: backward refused: x"
    assert "routed" not in {column.key for column in table.columns}
    assert "routed" in {column.key for column in speed_tables(make_rows())[1].columns}


def make_check(provider: str, error: float | None, **errors: float) -> Row:
    labels = {"mode": "check", "dtype": "bfloat16", "tolerance": 1e-2}
    labels |= {f"error {name}": value for name, value in errors.items()}
    failed = "o is nan" if error is None else None
    right = error is not None and error < 1e-2
    row = make_row(provider, error, mode="check", correct=right, error=failed)
    return row.model_copy(update={"metric": METRIC, "labels": labels})


def test_accuracy_names_the_worst_tensor_and_what_is_wrong() -> None:
    rows = [
        make_check("triton", 3e-3, o=2e-3, d_k=3e-3),
        make_check("fla", 0.4, o=0.4),
        make_check("flash_qla", None, o=float("nan")),
    ]
    rows.append(rows[0].model_copy(update={"metric": "decisions_flipped", "value": 0.0012}))
    table = accuracy_table(SpeedRows(rows))
    assert table is not None
    found = {record["provider"]: record for record in table.records}
    assert (found["triton"]["worst_tensor"], found["triton"]["verdict"]) == ("d_k", "right")
    assert found["triton"]["decisions_flipped"] == 0.0012
    assert found["fla"]["verdict"] == "WRONG"
    assert found["flash_qla"]["verdict"] == "failed: o is nan"
    assert speed_tables(rows) == []


def test_without_comparisons_there_is_no_accuracy_table() -> None:
    assert accuracy_table(SpeedRows(make_rows())) is None


def test_changes_beside_the_commit_are_named(tmp_path: Path) -> None:
    build_kernel_report(make_rows(), tmp_path, [MANIFEST | {"dirty": True, "dirty_hash": "abc"}])
    assert "Commit 0000000 with changes (hash abc)" in (tmp_path / "kernels.md").read_text()


def test_targets_met_and_missed() -> None:
    rows = SpeedRows(make_rows())
    against_fla = judge(find_target("fla", "forward"), rows)
    assert against_fla.factor == 2.5
    assert against_fla.reaches(2.4) == MET and against_fla.reaches(2.6) == MISSED
    assert against_fla.reaches(None) is None
    # 0.36 / 0.4 = 0.9: within 1.2 times FlashQLA's time, but not equal to it.
    qla = judge(find_target("flash_qla", "forward"), rows)
    assert qla.reaches(qla.target.must) == MET and qla.reaches(qla.target.stretch) == MISSED


def test_no_target_rests_on_a_wrong_or_missing_time() -> None:
    rows = SpeedRows(make_rows())
    wrong = judge(find_target("flash_qla", "forward_backward"), rows)
    assert wrong.reaches(1.0) == NOT_MEASURED
    assert wrong.missing == "flash_qla: wrong result: dk"
    refused = judge(find_target("fla", "forward_backward"), rows)
    assert refused.missing == "fla: backward refused: x"
    assert judge(find_target("fla", "forward"), SpeedRows([])).missing == (
        "triton: not run; fla: not run"
    )
    graph = judge(find_target("fla", "forward"), rows, GRAPH)
    assert (graph.ours_ms, graph.factor) == (0.38, None)


def test_limits_in_milliseconds_and_other_fractions() -> None:
    limit = Target("index", "route_index", SHAPE, "forward", None, 0.015, None, 0.25)
    row = make_row("triton", 0.012, operation="route_index", fraction=0.25)
    verdict = judge(limit, SpeedRows([row]))
    assert verdict.reaches(limit.must) == MET and verdict.reaches(0.01) == MISSED
    dense = Target("dense", "routed_attention", SHAPE, "forward", "sdpa_cudnn", 2.7, 3.2, 0.25, 1.0)
    assert judge(dense, SpeedRows(make_rows())).factor == pytest.approx(3.0)


def test_every_target_is_in_the_table() -> None:
    records = targets_table(SpeedRows(make_rows())).records
    assert len(records) == len(TARGETS)
    elsewhere = [record for record in records if record["must_verdict"] == NOT_MEASURED]
    assert any("not part of" in str(record["missing"]) for record in elsewhere)


def test_figures() -> None:
    rows = SpeedRows(make_rows())
    drawing = operation_figure(rows, "gated_delta_rule")
    assert len(drawing.figure.axes) == 2
    assert "forward B8 T4096 H16 D128: flash_qla 0.360 ms" in drawing.alt
    assert operation_figure(rows, "ssd") is None


def test_reports_of_equal_rows_are_equal_byte_for_byte(tmp_path: Path) -> None:
    listings = [
        build_kernel_report(rows, tmp_path / name, [MANIFEST])
        for name, rows in (("a", make_rows()), ("b", make_rows()[::-1]))
    ]
    assert listings[0] == listings[1]
    assert (listings[0]["failed_rows"], listings[0]["wrong_rows"]) == (1, 1)
    for file in [*listings[0]["files"], "kernels.json"]:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    summary = (tmp_path / "a" / "kernels.md").read_text()
    for text in ("Made-up GPU", "Commit 0000000; torch 2.11, triton 3.6", "ssd/fla 0.6.0", "met"):
        assert text in summary
    assert "n counts seeds" not in summary


def test_command_and_publication(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = collect_manifest({"device": "cpu"}, ["ham"])
    path = tmp_path / RESULTS / "2026-01-01-gpu" / KERNEL_ROWS
    write_rows(path, make_rows())
    write_manifest(manifest_path(path), manifest)
    assert published_names(tmp_path) == ["2026-01-01-gpu"]
    assert build_published("2026-01-01-gpu", tmp_path) == [
        tmp_path / REPORTS / "2026-01-01-gpu" / "kernels.md"
    ]
    parsed = build_parser().parse_args(
        ["kernels", "report", str(path), "--out", str(tmp_path / "out")]
    )
    assert parsed.handler(parsed) == 0
    made = (tmp_path / REPORTS / "2026-01-01-gpu" / "kernels.md").read_bytes()
    assert (tmp_path / "out" / "kernels.md").read_bytes() == made


def test_rows_from_before_there_was_a_verdict_are_still_read() -> None:
    """The published rows of the CPU comparison have no `correct`."""
    root = Path(__file__).resolve().parents[2]
    rows = read_rows(root / RESULTS / "2026-11-22-cpu-kernels" / "bench.rows.jsonl")
    assert {row.correct for row in rows} == {None}
