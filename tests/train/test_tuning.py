from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import yaml

from ham.cli import main
from ham.cli.train import rate_overrides
from ham.config import Config
from ham.config_files import load_config, parse_config
from ham.errors import ConfigError, CorruptFileError, MissingDataError
from ham.files import read_json, write_json
from ham.report.aggregate import Results
from ham.report.formats import plain
from ham.report.rows import Row, read_rows, write_rows
from ham.report.table_format import entry_text
from ham.report.tables_base import Column
from ham.report.tables_tuning import tuning as tuning_table
from ham.train.shards import ShardWriter
from ham.train.tokenizer import ByteTokenizer
from ham.train.tuning import choose, chosen_rate, write_choice
from ham.workflow import SPLITS, rows_files, stage_hash, tuned_file

RATES = [0.001, 0.002, 0.004]
VALUES = {
    "name": "tiny",
    "seeds": [0],
    "arms": [{"name": "t", "mixer": "transformer"}, {"name": "u", "mixer": "transformer"}],
    "tuning": {"learning_rates": RATES, "seed": 1000, "steps": 7},
}


def config(**changes: object) -> Config:
    return parse_config({**VALUES, **changes})


def tuning_row(
    rate: float, value: float | None, step: int = 10, arm: str = "t", task: str = "validation"
) -> Row:
    return Row(
        experiment="tuning",
        metric="loss_nats",
        task=task,
        model=arm,
        mixer="transformer",
        seed=1000,
        value=value,
        error="the loss is nan" if value is None else None,
        x_name="step",
        x_value=float(step),
        labels={"learning_rate": rate},
        device="invented",
    )


def rows_with(*losses: float | None) -> list[Row]:
    return [tuning_row(rate, loss) for rate, loss in zip(RATES, losses, strict=True)]


def test_the_lowest_last_validation_loss_wins():
    early = [tuning_row(0.001, 0.1, step=5)]
    choice = choose([*early, *rows_with(2.0, 1.8, 1.9)], "t", RATES)
    assert (choice.learning_rate, choice.edge) == (0.002, None)
    assert choice.losses == {0.001: 2.0, 0.002: 1.8, 0.004: 1.9}


def test_text_and_recall_decide_together_where_both_are_known():
    mixed = [
        tuning_row(rate, loss, task="mixture")
        for rate, loss in zip(RATES, (1.0, 2.0, 2.0), strict=True)
    ]
    assert choose([*rows_with(2.0, 1.8, 1.9), *mixed], "t", RATES).learning_rate == 0.001
    failed = [*rows_with(None, 1.8, 1.9), *mixed[1:]]
    choice = choose(failed, "t", RATES)
    assert choice.losses == {0.001: None, 0.002: 2.0, 0.004: 2.0}


@pytest.mark.parametrize(
    ("losses", "rate", "edge"),
    [
        ((1.0, 1.8, 1.9), 0.001, "lowest"),
        ((2.0, 1.8, 1.7), 0.004, "highest"),
        ((2.0, 1.8, None), 0.002, None),
        ((1.8, 1.8, 1.9), 0.001, "lowest"),
    ],
)
def test_edges_failures_and_ties(losses: tuple, rate: float, edge: str | None):
    choice = choose(rows_with(*losses), "t", RATES)
    assert (choice.learning_rate, choice.edge) == (rate, edge)


def test_a_rate_that_was_not_tried_and_rates_that_all_failed():
    with pytest.raises(MissingDataError, match=r"arm 't' at learning rate 0.004; tried: 0.001, 0"):
        choose(rows_with(2.0, 1.9, 1.8)[:2], "t", RATES)
    with pytest.raises(MissingDataError, match="tried: none"):
        choose(rows_with(2.0, 1.9, 1.8), "u", RATES)
    with pytest.raises(ConfigError, match=r"no learning rate of arm 't' .*the loss is nan"):
        choose(rows_with(None, None, None), "t", RATES)


def test_a_choice_is_read_back(tmp_path: Path):
    path = tmp_path / "chosen.json"
    write_choice(path, choose(rows_with(2.0, 1.8, None), "t", RATES))
    assert chosen_rate(path, config(), "t") == 0.002
    assert read_json(path)["losses"] == {"0.001": 2.0, "0.002": 1.8, "0.004": None}
    with pytest.raises(ConfigError, match="is the choice of arm 't'; asked for 'u'"):
        chosen_rate(path, config(), "u")
    other = config(tuning={"learning_rates": [0.1, 0.2]})
    with pytest.raises(ConfigError, match=r"0.002 is not in tuning.learning_rates; known: \[0.1"):
        chosen_rate(path, other, "t")
    write_json(path, [1])
    with pytest.raises(CorruptFileError, match="is not a choice of `ham tune`"):
        chosen_rate(path, config(), "t")


def asked(**changes: object) -> Namespace:
    return Namespace(**{"tuned": None, "learning_rate": None, "arm": "t", "seed": 0, **changes})


def test_what_a_rate_changes_in_the_configuration(tmp_path: Path):
    write_choice(tmp_path / "c.json", choose(rows_with(2.0, 1.8, 1.9), "t", RATES))
    assert rate_overrides(asked(tuned=tmp_path / "c.json"), config()) == [
        "train.learning_rate=0.002"
    ]
    assert rate_overrides(asked(), config(tuning=None)) == []


@pytest.mark.parametrize(("tuning_steps", "steps"), [(7, 7), (None, 50)])
def test_a_tuning_run_has_the_steps_of_tuning_or_of_its_arm(
    tuning_steps: int | None, steps: int, tmp_path: Path
):
    arms = [{"name": "t", "mixer": "transformer", "steps": 50}]
    given = config(arms=arms, tuning={**VALUES["tuning"], "steps": tuning_steps})
    overrides = rate_overrides(asked(learning_rate=0.004, seed=1000), given)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(given.model_dump(mode="json")))
    tried = load_config(tmp_path / "c.yaml", overrides)
    assert (tried.train.learning_rate, tried.seeds, tried.tuning) == (0.004, [1000], None)
    assert tried.training(tried.arm("t")).steps == steps


@pytest.mark.parametrize(
    ("request_", "changes", "message"),
    [
        ({}, {}, "has a tuning section: give --tuned FILE"),
        ({"learning_rate": 0.003, "seed": 1000}, {}, "0.003 is not in tuning.learning_rates"),
        ({"learning_rate": 0.002, "seed": 0}, {}, "has seed tuning.seed, 1000; received 0"),
        ({"learning_rate": 0.002}, {"tuning": None}, "'tiny' has no tuning section"),
    ],
)
def test_rates_that_are_refused(request_: dict, changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        rate_overrides(asked(**request_), config(**changes))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"learning_rates": [0.1]}, "at least 2 items"),
        ({"learning_rates": [0.1, 0.1]}, "learning_rates must differ"),
        (
            {"learning_rates": [0.1, 0.2], "seed": 0},
            "tuning.seed 0 must not be one of the reported",
        ),
    ],
)
def test_a_tuning_section_that_is_refused(section: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        config(tuning=section)


def test_the_workflow_knows_the_files():
    assert tuned_file(config(), "t") == ["results/runs/tiny/tuning/t/chosen.json"]
    assert tuned_file(config(tuning=None), "t") == []
    files = [path for path in rows_files(config()) if "/tuning/" in path]
    assert len(files) == 6
    assert "results/runs/tiny/tuning/u/lr0.004/tuning.rows.jsonl" in files


def test_other_rates_retrain_and_nothing_else():
    other = config(tuning={**VALUES["tuning"], "steps": 8})
    changed = {
        stage
        for stage in ("prepare", "tune", "train", "evaluate", "measure", "inspect")
        if stage_hash(config(), stage, "t") != stage_hash(other, stage, "t")
    }
    assert changed == {"tune", "train"}


def test_the_sweep_stands_in_the_report_and_its_seed_is_not_counted():
    rows = [*rows_with(2.0, 1.8, None), *(tuning_row(rate, 2 - rate, arm="u") for rate in RATES)]
    results = Results(rows)
    assert results.seeds() == []
    table = tuning_table(results)
    assert [one["chosen"] for one in table.records] == [0.002, 0.004]
    assert [one["edge"] for one in table.records] == ["no", "highest"]
    failed = entry_text(table.records[0]["loss_at_0.004"], Column("x", "x", plain))
    assert failed == "failed: the loss is nan"


def test_the_command_chooses_and_warns(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(VALUES))
    write_rows(tmp_path / "x.rows.jsonl", rows_with(2.0, 1.8, 1.7))
    arguments = ["tune", str(tmp_path / "c.yaml"), "--arm", "t", "--out", str(tmp_path / "o.json")]
    assert main([*arguments, "--rows", str(tmp_path / "x.rows.jsonl")]) == 0
    printed = capsys.readouterr()
    assert "t: learning rate 0.004 (validation loss by rate: 0.001: 2.0000" in printed.out
    assert "the best rate is the highest tried" in printed.err
    assert read_json(tmp_path / "o.json")["learning_rate"] == 0.004


def test_a_tuning_run_leaves_rows_and_a_tuned_run_its_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    values = {
        **VALUES,
        "device": "cpu",
        "data": {"context": 32},
        "model": {"layers": 1, "width": 16, "heads": 2, "max_positions": 2048},
        "train": {"steps": 4, "batch_size": 1, "validation_every": 2, "validation_batches": 1},
        "tuning": {"learning_rates": [0.001, 1e30], "steps": 2},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    for split in SPLITS:
        with ShardWriter(tmp_path / f"data/{split}.tokens", ByteTokenizer()) as writer:
            writer.add(np.tile(np.arange(50), 40), 2000)
    train = ["train", "c.yaml", "--arm", "t", "--data", "data"]
    for rate in ("0.001", "1e+30"):
        tuned = ["--seed", "1000", "--learning-rate", rate, "--out", f"lr{rate}"]
        assert main([*train, *tuned]) == 0
        assert sorted(path.name for path in Path(f"lr{rate}").iterdir() if path.is_file()) == [
            "tuning.manifest.json",
            "tuning.rows.jsonl",
        ]
        assert not Path(f"lr{rate}/checkpoint").exists()
    good, bad = (read_rows(f"lr{rate}/tuning.rows.jsonl") for rate in ("0.001", "1e+30"))
    assert {row.experiment for row in good + bad} == {"tuning"}
    assert {row.x_value for row in good if row.task == "validation"} == {2.0}
    files = [f"lr{rate}/tuning.rows.jsonl" for rate in ("0.001", "1e+30")]
    assert main(["tune", "c.yaml", "--arm", "t", "--rows", *files, "--out", "chosen.json"]) == 0
    assert main([*train, "--seed", "0", "--tuned", "chosen.json", "--out", "run"]) == 0
    rows = read_rows("run/train.rows.jsonl")
    assert [row.value for row in rows if row.metric == "learning_rate"] == [0.001]
    (flops,) = (row.value for row in rows if row.metric == "training_flops")
    assert flops > 0
