from __future__ import annotations

import csv
import io
import re

import pytest

from ham.report import table_format, tables_needle, tables_quality
from ham.report.aggregate import Results
from ham.report.plots_base import Look
from ham.report.statistics import wilson_interval
from ham.report.tables import all_tables, comparison
from ham.report.tables_base import Table


@pytest.fixture(scope="module")
def one_seed(make_rows) -> dict[str, Table]:
    results = Results(make_rows())
    tables, skipped = all_tables(results, Look.of(results, smoke=True, context=512))
    assert not skipped
    return {table.name: table for table in tables}


@pytest.fixture(scope="module")
def three_seeds(make_rows) -> dict[str, Table]:
    results = Results(make_rows(seeds=(0, 1, 2)))
    tables, _ = all_tables(results, Look.of(results, context=512))
    return {table.name: table for table in tables}


def line(table: Table, **where) -> dict:
    (found,) = [r for r in table.records if all(r[key] == v for key, v in where.items())]
    return found


def text(table: Table, key: str, **where) -> str:
    (column,) = [column for column in table.columns if column.key == key]
    return table_format.entry_text(line(table, **where)[key], column)


def test_every_number_carries_n(one_seed, three_seeds):
    for tables, n in ((one_seed, "n=1"), (three_seeds, "n=3")):
        for table in tables.values():
            for column in table.columns:
                for record in table.records:
                    entry = record.get(column.key)
                    if getattr(entry, "estimate", None) is not None:
                        assert n in table_format.entry_text(entry, column)


def test_comparison_values(one_seed, make_rows):
    table = one_seed["comparison"]
    (row,) = [
        r
        for r in make_rows()
        if r.model == "ham-cosine"
        and r.metric == "bits_per_byte"
        and r.x_value == 512
        and r.experiment == "language_modelling"
    ]
    assert line(table, model="ham-cosine")["bits_per_byte"].value == row.value
    assert text(table, "bits_per_byte", model="ham-cosine") == (
        f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}] (n=1)"
    )
    assert text(table, "kv_fraction", model="ham-cosine") == "25.0 % (n=1)"
    assert text(table, "kv_fraction", model="mamba2") == "–"
    assert text(table, "bits_per_byte_difference", model="transformer") == "–"
    titles = [column.title for column in table.columns]
    assert "held out continuation (chance 25.0 %)" in titles
    assert "cache at 1,024" in titles


def test_differences_are_paired_by_seed(three_seeds):
    table = three_seeds["comparison"]
    ours = dict(line(table, model="mamba2")["bits_per_byte"].by_seed)
    theirs = dict(line(table, model="transformer")["bits_per_byte"].by_seed)
    gaps = [ours[seed] - theirs[seed] for seed in (0, 1, 2)]
    cell = line(table, model="mamba2")["bits_per_byte_difference"]
    assert cell.value == pytest.approx(sum(gaps) / 3)
    assert cell.estimate.interval == "t95"


def test_failed_cells_say_failed(one_seed):
    reason = "failed: OutOfMemoryError: invented: tried to allocate 9 GiB"
    assert text(one_seed["comparison"], "training_step_ms", model="sliding-window") == reason
    where = {"model": "sliding-window", "context": 1024}
    assert text(one_seed["throughput"], "train_ms", **where) == reason
    assert text(one_seed["throughput"], "decode_ms", **where).endswith("(n=1)")
    assert text(one_seed["memory"], "peak_train", **where) == reason
    where = {"model": "mamba2", "length": 1024, "task": "niah_single_2"}
    assert text(one_seed["needle"], "depth_0.5", **where).startswith("failed:")
    assert "5 failed" in text(one_seed["comparison"], "needle_accuracy", model="mamba2")


def test_failed_speed_rows_without_a_batch_size_join_the_usual_line(make_rows):
    rows = make_rows(models=["sliding-window"])
    rows = [row.model_copy(update={"labels": {}}) if row.error else row for row in rows]
    tables, _ = all_tables(Results(rows), Look.of(Results(rows)))
    (table,) = [table for table in tables if table.name == "throughput"]
    assert len(table.records) == 4
    assert text(table, "train_ms", context=1024).startswith("failed:")


def test_missing_experiments_are_not_run(make_rows):
    results = Results(make_rows(omit=["dial", "recall", "memory"]))
    tables, skipped = all_tables(results, Look.of(results, context=512))
    assert set(skipped) == {"dial", "recall", "memory"}
    (table,) = [table for table in tables if table.name == "comparison"]
    assert text(table, "recall_accuracy", model="transformer") == "not run"
    assert text(table, "cache_bytes_allocated", model="transformer") == "not run"


def test_many_tasks_become_one_mean_column(make_rows):
    rows = [row for row in make_rows(models=["transformer"]) if row.experiment == "lm_eval"]
    many = [row.model_copy(update={"task": f"{row.task}{i}"}) for row in rows for i in range(3)]
    results = Results(many)
    table = comparison(results, Look.of(results))
    (column,) = [column for column in table.columns if column.key.startswith("lm_eval")]
    assert column.title == "lm-eval accuracy (mean of 6 tasks, chance 12.5 %)"


def test_markdown_is_a_table_with_notes(one_seed):
    markdown = table_format.to_markdown(one_seed["comparison"], smoke=True)
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 6
    assert len({re.sub(r"\\\|", "", line).count("|") for line in lines}) == 1
    assert "Smoke run" in markdown and "n counts seeds" in markdown
    assert "Smoke run" not in table_format.to_markdown(one_seed["comparison"], smoke=False)


def test_markdown_escapes_bars(one_seed):
    table = one_seed["recall"]
    odd = Table("x", "x", "", table.columns, [{**table.records[0], "model": "a|b"}])
    assert "a\\|b" in table_format.to_markdown(odd, smoke=False)


def test_csv_holds_plain_numbers(one_seed, three_seeds):
    records = list(csv.DictReader(io.StringIO(table_format.to_csv(one_seed["comparison"]))))
    by_model = {record["model"]: record for record in records}
    entry = line(one_seed["comparison"], model="transformer")["bits_per_byte"]
    assert float(by_model["transformer"]["bits_per_byte"]) == entry.value
    assert float(by_model["transformer"]["bits_per_byte_low"]) == entry.estimate.low
    assert by_model["transformer"]["bits_per_byte_interval"] == "bootstrap95"
    assert by_model["transformer"]["bits_per_byte_n"] == "1"
    assert by_model["transformer"]["bits_per_byte_observations"] == "24"
    status = by_model["sliding-window"]["training_step_ms_status"]
    assert status.startswith("failed: OutOfMemoryError")
    assert by_model["sliding-window"]["training_step_ms"] == ""
    assert by_model["mamba2"]["kv_fraction_status"] == "does not apply"
    records = csv.DictReader(io.StringIO(table_format.to_csv(three_seeds["comparison"])))
    assert {record["bits_per_byte_n"] for record in records} == {"3"}


def test_latex_is_booktabs_and_escaped(one_seed):
    latex = table_format.to_latex(one_seed["comparison"], smoke=True)
    for rule in (r"\toprule", r"\midrule", r"\bottomrule", r"\caption{", r"\label{tab:comparison}"):
        assert rule in latex
    assert r"100.0 \%" in latex
    assert r"$\Delta$ to transformer" in latex
    body = latex.split(r"\toprule")[1].split(r"\bottomrule")[0]
    assert not re.search(r"(?<!\\)[%#_]", body)
    assert latex.split("\n", 1)[1].isascii()


def test_latex_escapes_hostile_text():
    assert table_format.latex_escape(r"a_b 50% \x {y} ~^&#$") == (
        r"a\_b 50\% \textbackslash{}x \{y\} \textasciitilde{}\textasciicircum{}\&\#\$"
    )


def test_tooltips_say_where_a_number_comes_from(one_seed):
    rows = table_format.html_rows(one_seed["comparison"], lambda cell: "rerun: ham x")
    entry = rows[0][[c.key for c in one_seed["comparison"].columns].index("bits_per_byte")]
    assert "synthetic device" in entry.tip
    assert "bootstrap95" in entry.tip
    assert "rerun: ham x" in entry.tip
    assert "realised KV fraction 1.0000" in entry.tip


def test_needles_by_task(one_seed):
    where = {"model": "ham-cosine", "length": 1024, "task": "niah_multivalue"}
    assert line(one_seed["needle"], **where)["depth_0.5"] is None
    # 0.4 of 20 samples and of 80 answers.
    mean, expected = line(one_seed["needle"], **where)["mean"].estimate, wilson_interval(8, 20)
    assert (mean.value, mean.low, mean.high) == (0.4, expected.low, expected.high)
    assert line(one_seed["needle"], **where)["generated"].value == 0.4
    assert text(one_seed["needle"], "left_out", **where) == "5"
    where["task"] = "niah_single_2"
    assert line(one_seed["needle"], **where)["generated"] is None
    assert text(one_seed["needle"], "left_out", **where) == "0"


def test_routed_against_answered(one_seed):
    table = one_seed["needle_routed"]
    assert {record["model"] for record in table.records} == {"ham-cosine", "ham-committed"}
    where = {"model": "ham-cosine", "task": "niah_multivalue"}
    # Three lengths of 80 answers, a quarter of them in two layers: 60, of which 0.8; 180 others.
    record = line(table, min_layers=2, **where)
    answered, expected = record["answered"].estimate, wilson_interval(48, 60)
    assert (record["count"], record["routed"].value, answered.value) == (60, 0.25, 0.8)
    assert (answered.low, answered.high) == (expected.low, expected.high)
    assert record["otherwise"].value == pytest.approx(0.3)
    assert line(table, min_layers=0, **where)["otherwise"] is None


def test_one_task_has_the_table_that_was_published(make_rows):
    """Rows of before the tasks had one, `needle_single`: no new column, no new table."""
    rows = [
        row
        for row in make_rows(models=["transformer"])
        if row.experiment != "needle" or row.task == "niah_single_2"
    ]
    table = tables_needle.needle(Results(rows))
    keys = [column.key for column in table.columns]
    assert keys[:3] == ["model", "length", "depth_0"] and keys[-3:] == [
        "mean",
        "seeds_found",
        "kept",
    ]
    assert not tables_needle.needle_routed(Results(rows)).records


def test_lm_eval_scores_stand_beside_two_references(make_rows):
    rows = make_rows(models=["mamba2"])
    table = tables_quality.lm_eval(Results(rows))
    (record,) = [one for one in table.records if one["task"] == "held_out_continuation"]
    assert record["chance"] == 0.25 and record["untrained"].value == 0.26
    assert not any(one["metric"].startswith(("chance", "untrained")) for one in table.records)
    assert "requests cut" not in [column.title for column in table.columns]
    cut = [
        row.model_copy(update={"labels": {"truncated": 3}}) if row.task == record["task"] else row
        for row in rows
    ]
    (record,) = [
        one for one in tables_quality.lm_eval(Results(cut)).records if one["truncated"] is not None
    ]
    assert record["truncated"] == 3 and record["task"] == "held_out_continuation"


def test_classes_of_words_by_hand(make_rows):
    rows = make_rows(models=["transformer", "mamba2"])
    table = tables_quality.token_classes(Results(rows))
    first = table.records[0]
    assert (first["model"], first["context"]) == ("transformer", 256)
    known = {
        row.labels["token_class"]: row.value
        for row in rows
        if row.metric == "class_bits_per_byte" and row.model == "transformer" and row.x_value == 256
    }
    assert {name: first[name].value for name in known} == known
    assert first["difference"].value == pytest.approx(known["recall"] - known["other"])
    assert "recalled 30.0 %" in table.note and "rare 25.0 %" in table.note


def test_the_dial_lists_what_was_measured_along_it(make_rows):
    rows = make_rows(models=["ham-cosine"])
    table = tables_quality.dial(Results(rows))
    assert (
        table.records[0]["kv_bytes"].value == 0 and table.records[-1]["kv_bytes"].value == 512_000
    )
    text = [row for row in rows if row.metric == "bits_per_byte"]
    assert len(tables_quality.dial(Results(text)).columns) == 5


def test_the_needle_table_counts_seeds_that_find_more_than_half(three_seeds):
    where = {"length": 256, "task": "niah_single_2"}
    assert line(three_seeds["needle"], model="transformer", **where)["seeds_found"] == "3 of 3"
    assert line(three_seeds["needle"], model="sliding-window", **where)["seeds_found"] == "0 of 3"


def test_recall_stands_beside_the_share_kept_of_its_own_documents(make_rows):
    rows = [
        row.model_copy(update={"kv_fraction": 0.135})
        if row.experiment == "recall" and row.model == "ham-cosine" and row.x_value == 16
        else row
        for row in make_rows()
    ]
    table = tables_quality.recall(Results(rows))
    assert text(table, "kept_16", model="ham-cosine") == "13.5 % (n=1)"
    assert text(table, "kept_16", model="mamba2") == "–"
    assert "kept_2" not in [column.key for column in table.columns]


def test_a_normalised_accuracy_that_repeats_the_plain_one_is_left_out(make_rows):
    rows = make_rows(models=["transformer", "mamba2"])
    plain = [row for row in rows if row.experiment == "lm_eval" and row.metric == "accuracy"]
    same = [row.model_copy(update={"metric": "accuracy_norm"}) for row in plain]
    metrics = {record["metric"] for record in tables_quality.lm_eval(Results(rows + same)).records}
    assert metrics == {"accuracy", "bits_per_byte"}
    # One model whose choices differ in length, and the metric says something.
    same[0] = same[0].model_copy(update={"value": 0.9})
    records = tables_quality.lm_eval(Results(rows + same)).records
    shown = {record["task"] for record in records if record["metric"] == "accuracy_norm"}
    assert shown == {same[0].task}


def test_the_speed_table_says_how_models_were_launched(one_seed):
    launched = "launched eagerly, one sequence, without CUDA graphs"
    assert one_seed["throughput"].title == f"Throughput, {launched}"
    assert launched in one_seed["comparison"].note


def test_notes_of_the_caller_end_a_caption(make_rows):
    results = Results(make_rows(models=["transformer"]))
    tables, _ = all_tables(results, Look.of(results), {"recall": "Documents are shorter."})
    notes = {table.name: table.note for table in tables}
    assert notes["recall"].endswith(" Documents are shorter.")
    assert "Documents are shorter." not in notes["needle"]


def test_gates_have_a_line_per_layer(three_seeds):
    table = three_seeds["gates"]
    assert [record["model"] for record in table.records] == ["ham-cosine"] * 2 + [
        "ham-committed"
    ] * 2
    assert text(table, "attention_mean", model="ham-cosine", layer=1.0).startswith("0.400 ")
    assert text(table, "attention_p5", model="ham-cosine", layer=1.0).startswith("0.200 ")
    assert text(table, "recurrent_p95", model="ham-cosine", layer=0.0).startswith("0.800 ")
    assert text(table, "ratio", model="ham-cosine", layer=1.0).startswith("0.400 ")


def test_agreement_adds_up_the_layers_of_a_pair(one_seed):
    table = one_seed["agreement"]
    steps = line(table, model="ham-cosine", form="steps")
    expected = {"decisions": 1000, "flips": 5, "near": 41, "logits": 0.25}
    assert {key: steps[key] for key in expected} == expected
    assert steps["distance"] == pytest.approx(0.002)
    assert line(table, model="ham-cosine", form="pieces of 64")["flips"] == 0


def test_gates_and_agreement_are_not_missed(make_rows):
    results = Results(make_rows(omit=("gates", "agreement")))
    tables, skipped = all_tables(results, Look.of(results, context=512))
    assert not {"gates", "agreement"} & {table.name for table in tables}
    assert not skipped
