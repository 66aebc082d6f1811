from __future__ import annotations

from ham.report.aggregate import Results
from ham.report.plots_base import Look
from ham.report.summary import summary_sentences


def summary(rows) -> dict[str, str]:
    results = Results(rows)
    return dict(summary_sentences(results, Look.of(results, context=512)))


def test_words_follow_the_numbers(make_rows):
    said = summary(make_rows())
    assert said["Models"].startswith("6 models of 0.640 M to 0.645 M parameters (0.8 % apart)")
    assert "1 seed each" in said["Models"]
    assert "(context 512): transformer with" in said["Language"]
    assert "With one seed there is no interval on this order." in said["Language"]
    assert (
        "All 6 models that were evaluated beat a unigram model, which needs 4.520"
        in said["Language"]
    )
    assert "25.0 % by ham-cosine and 24.0 % by ham-committed" in said["KV cache"]
    assert "transformer is best" in said["Recall"]
    assert said["Failures"].startswith("8 cells failed (mamba2 and sliding-window)")


def test_another_winner_changes_the_words(make_rows):
    rows = [
        row.model_copy(update={"value": 1.0, "low": 0.9, "high": 1.1})
        if row.model == "mamba2" and row.metric == "bits_per_byte" and row.value is not None
        else row
        for row in make_rows()
    ]
    assert "mamba2 with 1.000 [0.900, 1.100] (n=1)" in summary(rows)["Language"]


def test_losing_to_the_unigram_model_is_said(make_rows):
    rows = [
        row.model_copy(update={"value": 5.0, "low": 4.9, "high": 5.1})
        if row.model == "mamba2" and row.metric == "bits_per_byte"
        else row
        for row in make_rows()
    ]
    assert "mamba2 did not beat a unigram model" in summary(rows)["Language"]


def test_seeds_decide_whether_the_best_two_differ(make_rows):
    rows = make_rows(seeds=(0, 1, 2), models=["transformer", "mamba2"])
    assert "The seeds tell transformer and mamba2 apart" in summary(rows)["Language"]
    level = [
        row.model_copy(update={"value": 2.0 + 0.1 * ((row.seed + (row.model == "mamba2")) % 3)})
        if row.metric == "bits_per_byte"
        else row
        for row in rows
    ]
    assert "do not tell" in summary(level)["Language"]


def test_a_tie_has_no_winner(make_rows):
    level = {"value": 0.0, "low": 0.0, "high": 0.16, "interval": "wilson95"}
    rows = [
        row.model_copy(update=level)
        if row.experiment == "needle" and row.metric == "accuracy" and row.value is not None
        else row
        for row in make_rows()
    ]
    assert "Needle in a haystack: none answers." in summary(rows)["Recall"]
    some = [
        row.model_copy(update={"value": 0.25}) if row.value == 0.0 and row.n == 20 else row
        for row in rows
    ]
    said = summary(some)["Recall"]
    assert "Needle in a haystack, mean over the grid: 25.0 % for every model." in said


def test_seeds_that_find_needles_are_counted_by_model(make_rows):
    said = summary(make_rows(seeds=(0, 1), models=["transformer", "sliding-window"]))["Recall"]
    assert "half of the needles at 256 tokens, in the task that each does best: " in said
    assert "transformer 2 of 2" in said and "sliding-window 0 of 2" in said


def test_speeds_name_how_they_were_launched(make_rows):
    said = summary(make_rows())["Speed"]
    assert said.startswith(
        "Fastest at 1,024 tokens of context, launched eagerly, one sequence, without CUDA graphs: "
    )


def test_models_of_which_only_rates_were_tried_are_not_counted(make_rows):
    tried = [
        row.model_copy(update={"experiment": "tuning", "model": "tried", "seed": 1000})
        for row in make_rows(models=["mamba2"])[:1]
    ]
    said = summary([*make_rows(models=["transformer"]), *tried])["Models"]
    assert said.startswith("1 model of ")
    assert said.endswith("Only learning rates were tried for tried.")


def test_missing_parts_are_left_out(make_rows):
    said = summary(make_rows(omit=["dial", "needle", "recall", "throughput", "lm_eval"]))
    assert {"The dial", "Recall", "Speed", "Tasks"}.isdisjoint(said)
    assert summary([]) == {"Models": "There are no result rows.", "Failures": "No cell failed."}
