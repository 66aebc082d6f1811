"""What a reader of the first screen learns, and what is not made up for a smoke run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ham.fingerprint import repository_root
from ham.report.aggregate import Results
from ham.report.first_screen import first_screen, missing_jobs
from ham.report.readme import README, results_section, with_section
from ham.report.rows import Row

SETTINGS = {
    "name": "full",
    "scale": "full",
    "seeds": [0, 1],
    "arms": [{"name": "a"}, {"name": "b", "seeds": [0]}, {"name": "c", "checkpoint_of": "a"}],
    "measure": None,
    "tuning": {"learning_rates": [0.001, 0.002], "seed": 1000},
    "train": {"steps": 10, "batch_size": 4},
    "data": {
        "source": "public_domain",
        "tokenizer": "byte",
        "context": 100,
        "recall_fraction": 0.1,
    },
}


def row(model: str, seed: int, metric: str, value: float, **fields: object) -> Row:
    common = {"mixer": "m", "device": "CPU", "parameters": 5_000_000}
    return Row(
        **{"experiment": "train", **common, **fields},
        model=model,
        seed=seed,
        metric=metric,
        value=value,
    )


def ends(model: str, seed: int) -> list[Row]:
    place = {"x_name": "step", "x_value": 10}
    return [
        row(model, seed, "loss_nats", 1.0, task="training_text", **place),
        row(model, seed, "loss_nats", 1.5, task="validation", **place),
        row(model, seed, "corpus_epochs", 3.0),
    ]


def judged(identity: str, verdict: str, *tests: object) -> SimpleNamespace:
    return SimpleNamespace(
        claim=SimpleNamespace(id=identity, statement=f"Statement {identity}."),
        verdict=verdict,
        tests=tuple(tests),
    )


def test_the_answer_names_refuted_and_open_claims():
    verdicts = [judged("P1", "supported"), judged("C2", "refuted"), judged("C3", "inconclusive")]
    results = Results([*ends("a", 0), *ends("a", 1), *ends("b", 0)])
    found = dict(first_screen(results, SETTINGS, verdicts, {}, ["train b seed 1"]))
    assert found["Found"] == (
        "Supported: P1 (Statement P1). Refuted: C2 (Statement C2). Inconclusive: C3; the ledger "
        "has the n that would settle it, where one can be told."
    )
    assert "2 models, 4,000 training tokens each (byte tokens, context 100)" in found["Done"]
    assert "1 to 2 seeds" in found["Done"]
    assert "2 learning rates tried for every architecture on seed 1000" in found["Done"]
    assert found["Missing"].startswith("1 jobs have no rows: train b seed 1;")
    threats = found["Threats to validity"]
    assert "5.000 M parameters" in threats
    assert "the text was read 3.00 times" in threats
    assert "+0.500 to +0.500 nats a token more" in threats
    assert "Fewer than three seeds, which decide nothing: a and b." in threats
    assert "ham train full.yaml --arm a --seed 0" in found["Running a cell again"]


def scored(model: str, seed: int, bits: float, recall: float = 0.5) -> list[Row]:
    text = {"experiment": "language_modelling", "x_name": "context", "x_value": 100}
    pairs = {"experiment": "recall", "x_name": "pairs", "n": 10}
    return [
        row(model, seed, "bits_per_byte", bits, **text),
        row(model, seed, "accuracy", 0.9, x_value=4, **pairs),
        row(model, seed, "accuracy", recall, x_value=8, **pairs),
    ]


def test_numbers_are_those_of_every_model_with_its_n_best_first():
    rows = [one for seed in range(3) for one in scored("a", seed, 2.0)]
    rows += [one for seed in range(3) for one in scored("b", seed, 1.5)]
    rows += scored("single", 0, 1.0)
    found = dict(first_screen(Results(rows), SETTINGS, [], {}, []))
    assert found["Numbers"] == (
        "Bits per byte, share of 8 pairs recalled and decoding memory at 100 tokens: "
        "single 1.000 (n=1), 50.0 % (n=1); b 1.500 ± 0.000 (n=3), 50.0 % ± 0.0 % (n=3); "
        "a 2.000 ± 0.000 (n=3), 50.0 % ± 0.0 % (n=3)."
    )


def test_models_of_which_only_rates_were_tried_are_counted_apart():
    tried = {"experiment": "tuning", "labels": {"learning_rate": 0.001}}
    rows = [*ends("a", 0), *ends("a", 1), row("tried", 1000, "loss_nats", 2.0, **tried)]
    found = dict(first_screen(Results(rows), SETTINGS, [], {}, []))
    assert found["Done"].startswith("1 models, ") and "; 2 seeds;" in found["Done"]
    assert found["Done"].endswith("Only learning rates were tried for tried.")
    assert "decide nothing: a." in found["Threats to validity"]


def over(experiment: str, metric: str, arm: str, *references: str) -> SimpleNamespace:
    test = SimpleNamespace(
        where=SimpleNamespace(experiment=experiment, metric=metric),
        arms=[SimpleNamespace(name=arm, model=arm)],
        reference=[SimpleNamespace(name=name, model=name) for name in references],
    )
    return SimpleNamespace(claim="", test=test, verdict="supported")


def test_a_reference_that_recalls_nothing_is_said_beside_the_verdict():
    rows = [*scored("a", 0, 1.0), *scored("weak", 0, 2.0, recall=0.04)]
    text = ("language_modelling", "bits_per_byte", "a")
    verdicts = [
        judged("P1", "supported", over(*text, "weak")),
        judged("P4", "supported", over("train", "training_flops", "a", "weak")),
        judged("C3", "inconclusive", over(*text, "weak")),
        judged("C2", "refuted", over("recall", "accuracy", "weak", "a")),
    ]
    found = dict(first_screen(Results(rows), SETTINGS, verdicts, {}, []))["Found"]
    note = "[weak itself recalls 4.0 % of 8 pairs]"
    assert f"P1 (Statement P1) {note}" in found and f"Inconclusive: C3 {note};" in found
    assert found.count("itself recalls") == 2


def test_a_claim_about_flops_stands_beside_the_measured_speed():
    place = {"experiment": "throughput", "task": "train", "x_name": "context", "x_value": 100}
    place["labels"] = {"batch_size": 1}
    rows = [
        *scored("a", 0, 1.0),
        row("a", 0, "tokens_per_second", 50.0, **place),
        row("full", 0, "tokens_per_second", 100.0, **place),
    ]
    flops = over("train", "training_flops", "a", "full")
    verdicts = [judged("P4", "supported", flops)]
    found = dict(first_screen(Results(rows), SETTINGS, verdicts, {}, []))["Found"]
    assert (
        "P4 (Statement P4) [measured training speed: a 0.50 times full (launched eagerly, one "
        "sequence, without CUDA graphs, 100 tokens)]"
    ) in found
    without = dict(first_screen(Results(rows[:3]), SETTINGS, verdicts, {}, []))["Found"]
    assert "measured" not in without


def test_a_window_that_holds_whole_recall_documents_is_said_beside_the_verdict():
    arms = [
        {"name": "near", "options": {"window": 500}},
        {"name": "tiny", "options": {"window": 9}},
    ]
    rows = [*scored("a", 0, 1.0), *scored("near", 0, 2.0), *scored("tiny", 0, 2.0)]
    verdicts = [judged("C1", "refuted", over("recall", "accuracy", "a", "near", "tiny"))]
    settings = {**SETTINGS, "arms": arms}
    found = dict(first_screen(Results(rows), settings, verdicts, {}, []))["Found"]
    assert "[near with a window that holds these documents whole]" in found


def test_running_again_says_first_how_to_get_the_state():
    results = Results(ends("a", 0))
    command = ["ham", "train", "run/config.yaml", "--data", "run/data", "--out", "run/a"]
    manifests = {results.rows[0].manifest_id: {"command": command}}
    packed = first_screen(results, SETTINGS, [], manifests, [], pieces=["results/pieces/full-*.xz"])
    text = dict(packed)["Running a cell again"]
    unpack, prepare = "`ham unpack results/pieces/full-*.xz`", "`ham prepare run/config.yaml --out"
    assert text.index(unpack) < text.index(prepare) < text.index("`ham train run/config.yaml")
    text = dict(first_screen(results, SETTINGS, [], manifests, []))["Running a cell again"]
    assert "unpack" not in text and f"{prepare} run/data`" in text


def test_a_smoke_run_answers_nothing():
    results = Results(ends("a", 0))
    assert first_screen(results, {**SETTINGS, "scale": "smoke"}, [], {}, []) == []


def test_missing_jobs_are_those_without_any_row():
    rows = [
        *ends("a", 0),
        row("a", 0, "bits_per_byte", 2.0, experiment="language_modelling"),
        row("a", 1000, "loss_nats", 2.0, experiment="tuning", labels={"learning_rate": 0.001}),
    ]
    assert missing_jobs(SETTINGS, Results(rows)) == [
        "tuning a rate 0.002",
        "train a seed 1",
        "evaluate a seed 1",
        "tuning b rate 0.001",
        "tuning b rate 0.002",
        "train b seed 0",
        "evaluate b seed 0",
        "evaluate c seed 0",
        "evaluate c seed 1",
    ]


def test_what_was_only_measured_was_not_evaluated():
    timed = row("a", 0, "decode_ms", 1.0, experiment="dial", manifest_id="one")
    manifests = {"one": {"command": ["ham", "measure", "full.yaml"]}}
    assert "evaluate a seed 0" in missing_jobs(SETTINGS, Results([timed]), manifests)
    assert "evaluate a seed 0" not in missing_jobs(SETTINGS, Results([timed]))


def test_results_in_the_readme_are_those_that_are_published():
    root = repository_root()
    text = (root / README).read_text(encoding="utf-8")
    assert with_section(text, results_section(root)) == text, "run `ham publish readme`"


def test_a_readme_without_markers_is_refused():
    with pytest.raises(Exception, match="has no lines"):
        with_section("nothing", "section")
