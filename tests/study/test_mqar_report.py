"""The report of the study: hand-worked differences, what counts in means, what was kept."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ham.cli import main
from ham.fingerprint import repository_root
from ham.report.aggregate import Results
from ham.report.plots_base import style_context
from ham.report.rows import Row, read_rows, write_rows
from ham.study.report import build_report, figures, page_tables, verdicts
from ham.study.report_tables import (
    accuracy_table,
    compared_pairs,
    comparison_table,
    completed,
    mean_over_sizes,
    routing_table,
    settings_of,
    version_table,
    words_for,
)

PUBLISHED = repository_root() / "results/published/2026-11-25-h100-mqar"


def made_up_rows() -> list[Row]:
    """Committed is better than cosine by 0.10, 0.20, 0.30 at 8 pairs, alike at 2."""
    rows = []
    for model, shift in (("ham-cosine", 0.0), ("ham-committed", 0.1)):
        for seed in range(3):
            for task, value in (("16/2", 0.9), ("32/8", 0.4 + shift * (seed + 1))):
                rows.append(
                    Row(
                        experiment="mqar",
                        model=model,
                        mixer="ham",
                        seed=seed,
                        metric="accuracy",
                        value=value,
                        task=task,
                        x_name="pairs",
                        x_value=float(task.split("/")[1]),
                        labels={
                            "filler": "blank",
                            "layout": "prefix",
                            "variant": "plain",
                            "width": 64,
                            "learning_rate": 0.003,
                        },
                        kv_fraction=0.25,
                        device="cpu",
                    )
                )
    return rows


def test_paired_differences_are_those_worked_out_by_hand():
    results = Results(made_up_rows())
    (record,) = comparison_table(results, settings_of(results)).records
    assert record["pair"] == "ham-committed − ham-cosine"
    cell = record["difference_32/8"]
    # Mean 0.2, standard deviation 0.1, t(2) = 4.3027: half width 4.3027 * 0.1 / sqrt(3).
    assert cell.value == pytest.approx(0.2)
    assert cell.estimate.high - cell.value == pytest.approx(0.24841, abs=1e-5)
    assert record["difference_16/2"].value == 0
    assert record["difference_mean"].value == pytest.approx(0.1)
    assert mean_over_sizes(results, "ham-committed").value == pytest.approx(0.75)
    assert verdicts(results)[-1].endswith("not decided: the interval holds 0")
    narrower = [row for row in made_up_rows() if row.seed < 2]
    assert verdicts(Results(narrower))[-1].endswith("fewer than three common seeds")


def test_a_seed_that_lacks_a_measurement_is_left_out_of_means():
    rows = [row for row in made_up_rows() if (row.seed, row.task) != (2, "32/8")]
    results = Results([*rows, made_up_rows()[-1]])
    assert mean_over_sizes(results, "ham-committed").estimate.n == 3
    assert mean_over_sizes(results, "ham-cosine").estimate.n == 2


def test_a_score_is_called_better_only_outside_the_interval():
    rows = [
        row.model_copy(update={"value": row.value + 0.3 * (row.model == "ham-cosine")})
        for row in made_up_rows()
    ]
    assert verdicts(Results(rows))[-1].endswith("; ham-cosine is better")


def test_the_report_has_table_figure_and_failures(tmp_path: Path):
    failed = made_up_rows()[0].model_copy(
        update={"model": "ham-broken", "value": None, "error": "RuntimeError: no luck"}
    )
    folder = tmp_path / "rows"
    write_rows(folder / "a.rows.jsonl", [*made_up_rows(), failed])
    assert main(["mqar", "report", str(folder), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out/mqar.md").read_text()
    assert "failed: RuntimeError: no luck" in text
    assert "| blank filler, d 64 | ham-committed | 90.0 % ± 0.0 % (n=3) | 60.0 %" in text
    assert "One rate for all; it was not tuned." in text
    assert (tmp_path / "out/mqar.png").read_bytes()[:4] == b"\x89PNG"
    results = Results(made_up_rows())
    table = accuracy_table(results, settings_of(results))
    assert [column.title for column in table.columns][:4] == [
        "setting",
        "model",
        "16/2",
        "32/8",
    ]


def test_a_report_of_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "rows").mkdir()
    assert main(["mqar", "report", str(tmp_path / "rows"), "--out", str(tmp_path / "out")]) == 2
    assert "holds no *.rows.jsonl" in capsys.readouterr().err
    with pytest.raises(Exception, match="no rows of experiment 'mqar'"):
        build_report([], tmp_path / "out")


def changed(row: Row, labels: dict | None = None, **fields: object) -> Row:
    return row.model_copy(update={**fields, "labels": {**row.labels, **(labels or {})}})


def test_sizes_longer_than_trained_stand_apart_and_count_in_no_mean():
    rows = [changed(row, {"training_context": 32}) for row in made_up_rows()]
    longer = [
        changed(row, value=0.0, task="64/16", x_value=16.0) for row in rows if row.task == "32/8"
    ]
    results = Results([*rows, *longer])
    settings = settings_of(results)
    assert "accuracy_64/16" not in {c.key for c in accuracy_table(results, settings).columns}
    (first, _) = accuracy_table(results, settings, longer=True).records
    assert set(first) == {"setting", "model", "accuracy_64/16", "kv_fraction"}
    assert mean_over_sizes(results, "ham-committed").value == pytest.approx(0.75)
    (record,) = comparison_table(results, settings).records
    assert "difference_64/16" not in record
    titles = [table.title for table in page_tables(results)]
    assert titles[:2] == ["Accuracy", "Longer than trained: not trained at this length"]


def test_every_arm_is_compared_with_random_routing_and_scores_with_each_other():
    models = ["transformer", "ham-cosine", "ham-learned", "ham-random", "hola"]
    assert compared_pairs(models) == [
        ("ham-cosine", "ham-learned"),
        ("ham-cosine", "ham-random"),
        ("ham-learned", "ham-random"),
        ("transformer", "ham-random"),
        ("hola", "ham-random"),
    ]
    assert compared_pairs(["transformer", "hola"]) == []


def test_recall_precision_and_slots_stand_beside_the_fraction():
    rows = made_up_rows()
    base = [row for row in rows if row.model == "ham-cosine"]
    kept = [
        changed(row, {"layer": layer}, metric=metric, value=value)
        for row in base
        for layer in (0, 1)
        for metric, value in (("pairs_kept_fraction", 0.5), ("routed_precision", 0.25))
    ]
    results = Results([*rows, *kept])
    settings = settings_of(results)
    (record,) = routing_table(results, settings, every_size=False).records
    assert (record["model"], record["size"]) == ("ham-cosine", "32/8")
    assert record["trained"] == "not stated"
    assert record["kv_fraction"].value == 0.25
    # A quarter of 32 tokens for 8 pairs.
    assert record["slots_per_pair"].value == 1.0
    assert record["pairs_kept_fraction_1"].value == 0.5
    assert record["routed_precision_0"].estimate.n == 3
    assert len(routing_table(results, settings, every_size=True).records) == 2


def test_overwritten_keys_are_shown_by_version():
    rows = [changed(row, {"variant": "overwrites-4"}) for row in made_up_rows()]
    shares = {"accuracy_once": 0.9, "accuracy_overwritten": 0.3, "stale_answer_fraction": 0.6}
    rows += [changed(row, metric=m, value=v) for row in rows for m, v in shares.items()]
    table = version_table(Results(rows), every_size=False)
    assert len(table.records) == 4
    assert [table.records[0][metric].value for metric in shares] == list(shares.values())
    assert table.records[0]["setting"] == "blank filler, 4 keys overwritten, d 64"
    assert not version_table(Results(made_up_rows()), every_size=True).records


def test_settings_have_words_and_rows_from_before_variants_are_plain():
    setting = {"filler": "random", "layout": "scattered", "variant": "repeats-2", "width": 128}
    assert words_for(setting) == "random filler, scattered pairs, pairs read 2 times, d 128"
    path = next(PUBLISHED.glob("*.rows.jsonl"))
    old = [row for row in read_rows(path) if row.metric == "accuracy"]
    assert "variant" not in old[0].labels
    sizes = [{"length": 64, "pairs": 4}, {"length": 256, "pairs": 64}]
    found = completed(old, {"config": {"train": {"mixture": sizes}}})
    assert {(r.labels["variant"], r.labels["training_context"]) for r in found} == {("plain", 256)}
    assert completed(found, None) == found


def many_panels() -> list[Row]:
    """Five settings of two layers each, with accuracy and routing of two scores."""
    rows = []
    for filler, width, layout in itertools.product(
        ("blank", "random"), (64, 128), ("prefix", "scattered")
    ):
        for row in made_up_rows():
            labels = {"filler": filler, "width": width, "layout": layout}
            rows.append(changed(row, labels))
            rows += [
                changed(row, {**labels, "layer": layer}, metric=metric)
                for layer in (0, 1)
                for metric in ("pairs_kept_fraction", "routed_precision")
            ]
    return rows


def test_figures_of_many_panels_stay_legible():
    with style_context():
        drawn = dict(figures(Results(many_panels())))
    for name, panels in (("mqar", 8), ("mqar-recall", 16)):
        figure = drawn[name]
        shown = [axes for axes in figure.axes if axes.get_visible()]
        assert len(shown) == panels
        assert figure.get_figheight() < 1.6 * figure.get_figwidth()
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == ["ham-cosine", "ham-committed"]
        renderer = FigureCanvasAgg(figure).get_renderer()
        titles = [axes._left_title.get_window_extent(renderer) for axes in shown]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(titles, 2))
        assert not any(title.overlaps(axes.bbox) for title in titles for axes in shown)
        for axes in shown:
            left, right = axes.get_xlim()
            points = [
                x for line in axes.lines if line.get_marker() in "*v" for x in line.get_xdata()
            ]
            assert points and all(left < x < right for x in points)
