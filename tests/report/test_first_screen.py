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


def judged(identity: str, verdict: str) -> SimpleNamespace:
    return SimpleNamespace(
        claim=SimpleNamespace(id=identity, statement=f"Statement {identity}."), verdict=verdict
    )


def test_the_answer_names_refuted_and_open_claims():
    verdicts = [judged("P1", "supported"), judged("C2", "refuted"), judged("C3", "inconclusive")]
    results = Results([*ends("a", 0), *ends("a", 1), *ends("b", 0)])
    found = dict(first_screen(results, SETTINGS, verdicts, {}, ["train b seed 1"]))
    assert found["Found"] == (
        "Supported: P1 (Statement P1). Refuted: C2 (Statement C2). Inconclusive: C3; the ledger "
        "has the n that would settle each."
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


def test_numbers_are_those_of_models_with_three_seeds_best_first():
    def of(model: str, seed: int, bits: float) -> list[Row]:
        text = {"experiment": "language_modelling", "x_name": "context", "x_value": 100}
        recall = {"experiment": "recall", "x_name": "pairs", "n": 10}
        return [
            row(model, seed, "bits_per_byte", bits, **text),
            row(model, seed, "accuracy", 0.9, x_value=4, **recall),
            row(model, seed, "accuracy", 0.5, x_value=8, **recall),
        ]

    rows = [one for seed in range(3) for one in of("a", seed, 2.0)]
    rows += [one for seed in range(3) for one in of("b", seed, 1.5)]
    rows += [one for seed in range(2) for one in of("few", seed, 1.0)]
    found = dict(first_screen(Results(rows), SETTINGS, [], {}, []))
    assert found["Numbers"] == (
        "Bits per byte, share of 8 pairs recalled and decoding memory at 100 tokens: "
        "b 1.500 ± 0.000 (n=3), 50.0 %; a 2.000 ± 0.000 (n=3), 50.0 %."
    )


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


def test_results_in_the_readme_are_those_that_are_published():
    root = repository_root()
    text = (root / README).read_text(encoding="utf-8")
    assert with_section(text, results_section(root)) == text, "run `ham publish readme`"


def test_a_readme_without_markers_is_refused():
    with pytest.raises(Exception, match="has no lines"):
        with_section("nothing", "section")
