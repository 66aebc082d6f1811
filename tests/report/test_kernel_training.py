"""Section of the kernel report on training with each provider; every number is made up here."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from ham.cli import build_parser
from ham.report.kernel_report import build_kernel_report
from ham.report.kernel_training import (
    comparison_sentences,
    training_figure,
    training_runs,
    training_table,
)
from ham.report.loss_curves import (
    final_loss,
    largest_smoothed_difference,
    last_half_difference,
    smoothed,
)
from ham.report.manifest import collect_manifest, manifest_path, write_manifest
from ham.report.publish import REPORTS, RESULTS, TRAINING_ROWS, build_published, published_names
from ham.report.rows import Row, RowWriter, write_rows
from ham.train.compare_kernels import Curve, add_rows

STEPS = 100
NAME = "training-ham-cosine-seed0"
WORDS = "the difference of triton is 2.00 times that of the other rounding (0.00150 nats)."


def make_curve(variant: str, distance: float = 0.0, speed: float = 1e5) -> Curve:
    """A falling loss; every second step lies `distance` higher, the others lower."""
    losses = [2.0 + 3.0 * math.exp(-step / 30) + distance * (-1) ** step for step in range(STEPS)]
    provider = variant.removesuffix("-other-rounding")
    return Curve(variant, provider, losses, [0.25] * STEPS, speed)


def make_rows(*curves: Curve, seed: int = 0) -> list[Row]:
    writer = RowWriter(
        model="ham-cosine", mixer="ham", seed=seed, device="Made-up GPU", manifest_id="made-up"
    )
    add_rows(writer, curves)
    return writer.rows


def make_three() -> list[Row]:
    return make_rows(
        make_curve("torch"),
        make_curve("torch-other-rounding", 0.0015),
        make_curve("triton", 0.003, 3e5),
    )


def test_distances_of_curves() -> None:
    assert smoothed([1.0, 2.0, 3.0, 6.0], 3) == pytest.approx([2.0, 11 / 3])
    assert smoothed([1.0, 3.0], 20) == [2.0]
    assert smoothed([]) == []
    assert last_half_difference([9.0, 1.0, 2.0], [0.0, 2.0, 4.0]) == 1.5
    base = [0.0] * 30
    assert largest_smoothed_difference([*base[:-10], *[1.0] * 10], base) == pytest.approx(0.5)
    assert final_loss([9.0, *[1.0] * 20]) == 1.0


def test_numbers_of_the_table() -> None:
    (run,) = training_runs(make_three())
    records = {record["variant"]: record for record in training_table(run).records}
    assert list(records) == ["torch", "torch-other-rounding", "triton"]
    assert records["triton"]["times_faster"] == 3.0
    assert records["triton"]["loss_difference_nats"] == pytest.approx(0.003)
    assert records["triton"]["smoothed_loss_difference_nats"] == pytest.approx(0.0, abs=1e-9)
    assert records["torch"]["loss_difference_nats"] is None
    assert "peak_memory_bytes" not in {column.key for column in training_table(run).columns}


def test_sentence_compares_with_the_noise() -> None:
    (run,) = training_runs(make_three())
    assert comparison_sentences(run)[0].endswith(WORDS)
    (run,) = training_runs(make_rows(make_curve("torch"), make_curve("triton", 0.003)))
    assert comparison_sentences(run)[0].endswith("other rounding was not measured.")
    rows = make_rows(*map(make_curve, ("torch", "torch-other-rounding", "triton")))
    (run,) = training_runs(rows)
    assert comparison_sentences(run)[0].endswith("other rounding changed no loss at all here.")
    assert len(training_figure(run).figure.axes) == 2


def test_figure_and_failures() -> None:
    (run,) = training_runs(make_three())
    drawing = training_figure(run)
    loss, distance = drawing.figure.axes
    assert (len(loss.lines), len(distance.lines)) == (3, 2)
    assert distance.get_yscale() == "log"
    assert distance.lines[1].get_ydata()[-1] == pytest.approx(0.003)
    failed = Curve("triton", "triton", error="OutOfMemoryError: no room")
    (run,) = training_runs(make_rows(make_curve("torch"), failed))
    assert training_table(run).records[1]["note"] == "failed: OutOfMemoryError: no room"
    assert comparison_sentences(run) == []
    assert len(training_figure(run).figure.axes) == 1
    (run,) = training_runs(make_rows(failed))
    assert training_figure(run) is None


def test_reports_of_equal_rows_are_equal_byte_for_byte(tmp_path: Path) -> None:
    rows = [*make_three(), *make_rows(make_curve("torch"), seed=1)]
    listings = [
        build_kernel_report(given, tmp_path / name)
        for name, given in (("a", rows), ("b", rows[::-1]))
    ]
    assert listings[0] == listings[1]
    files = listings[0]["files"]
    assert {f"kernels/{NAME}.{suffix}" for suffix in ("md", "csv", "tex", "png", "svg")} < set(
        files
    )
    assert "kernels/targets.md" not in files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    summary = (tmp_path / "a" / "kernels.md").read_text()
    for text in (WORDS, f"(kernels/{NAME}.png)", "seed 1, with each provider", "Made-up GPU"):
        assert text in summary


def test_publication_and_command(tmp_path: Path) -> None:
    path = tmp_path / RESULTS / "2026-01-01-gpu" / TRAINING_ROWS
    write_rows(path, make_three())
    write_manifest(manifest_path(path), collect_manifest({"device": "cpu"}, ["ham"]))
    assert published_names(tmp_path) == ["2026-01-01-gpu"]
    page = tmp_path / REPORTS / "2026-01-01-gpu" / "kernels.md"
    assert build_published("2026-01-01-gpu", tmp_path) == [page]
    out = tmp_path / "out"
    parsed = build_parser().parse_args(["kernels", "report", str(path), "--out", str(out)])
    assert parsed.handler(parsed) == 0
    assert (out / "kernels.md").read_bytes() == page.read_bytes()
